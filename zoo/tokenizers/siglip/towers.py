"""The two transformers of SigLIP, which can be run piece by piece. Importing this file imports timm."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, trunc_normal_
from timm.layers.activations import GELUTanh
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_jax
from torch import Tensor, nn

from zoo.tokenizers.siglip.encoder import SigLIPConfig


class VisionTower(VisionTransformer):
    """pool(layers(embed(values))): timm's ViT with attention pooling, its three parts apart.

    A system that replaces features between two layers runs `layers` up to there and from there.
    """

    def __init__(self, c: SigLIPConfig):
        super().__init__(
            img_size=c.image_size,
            patch_size=c.patch_size,
            num_classes=0,
            global_pool="map",
            embed_dim=c.width,
            depth=c.depth,
            num_heads=c.num_heads,
            mlp_ratio=c.mlp_ratio,
            class_token=False,
            act_layer="gelu_tanh",
            weight_init="jax",
        )

    def embed(self, values: Tensor) -> Tensor:
        """Values (B, 3, H, W) in [-1, 1] to h_0 (B, N, D): patches and their positions."""
        return self.patch_embed(values) + self.pos_embed

    def layers(self, h: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """h_start (B, N, D) to h_stop (B, N, D), after `stop` layers; None: after all."""
        for block in self.blocks[start:stop]:
            h = block(h)
        return h

    def pool(self, h: Tensor) -> Tensor:
        """Output of the last layer (B, N, D) to one vector (B, D): post norm, then a learned query that attends."""
        return self.attn_pool(self.norm(h))

    def forward(self, values: Tensor) -> Tensor:
        """Values (B, 3, H, W) in [-1, 1] to (B, D), not normalised."""
        return self.pool(self.layers(self.embed(values)))


class TextTower(nn.Module):
    """A transformer without any mask whose last position is the text, padding or not."""

    def __init__(self, c: SigLIPConfig):
        super().__init__()
        width, heads = c.text_width, c.text_heads
        self.token_embed = nn.Embedding(c.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(c.text_length, width))
        layer = {"mlp_ratio": c.mlp_ratio, "qkv_bias": True, "act_layer": GELUTanh}
        self.blocks = nn.ModuleList(Block(width, heads, **layer) for _ in range(c.text_depth))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, c.width)
        for name, module in self.blocks.named_modules():
            init_weights_vit_jax(module, name)
        for table in (self.token_embed.weight, self.pos_embed):
            trunc_normal_(table, std=0.02)

    def features(self, ids: Tensor) -> Tensor:
        """Ids (B, text_length) int64 to features (B, text_length, W), after the norm."""
        h = self.token_embed(ids) + self.pos_embed
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, text_length) int64 to (B, D), not normalised."""
        return self.head(self.features(ids)[:, -1])
