"""The image tower of SEED: EVA-CLIP without its last block. Importing this file imports timm."""

from __future__ import annotations

from timm.models.eva import Eva
from torch import Tensor

from zoo.tokenizers.seed.tokenizer import EVAConfig


class EVATower(Eva):
    """timm's EVA (arXiv 2211.07636) up to its last block: neither norm nor pooling nor head."""

    def __init__(self, image_size: int, c: EVAConfig):
        super().__init__(
            img_size=image_size,
            patch_size=c.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=c.width,
            depth=c.depth,
            num_heads=c.num_heads,
            mlp_ratio=c.mlp_ratio,
            class_token=c.class_token,
            use_post_transformer_norm=False,
            use_fc_norm=False,
        )

    def forward(self, values: Tensor) -> Tensor:
        """Values (B, 3, S, S), normalised as CLIP's, to (B, 1 + N, D): class token, then patches in raster order."""
        return self.forward_features(values)
