"""Frozen networks whose features a tokenizer learns to predict."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.registry import encoders, tokenizers


class Teacher(nn.Module):
    """Features (B, N, D) of images (B, 3, H, W) in [0, 1], which are resized to the size it was made for.

    Args:
        name: an encoder of the zoo, a tokenizer of the zoo that has features, or "timm/NAME" for a model of timm.
        weights: a file, where the name alone has none.
        layer: of which the features are; None: the last, after its norm. Tokenizers have the last alone.
        image_size: of a model of timm that takes others than its own.

    Raises:
        ZooError: an unknown name, or weights that cannot be had.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        layer: int | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        self.name, self.layer = name, layer
        if name.startswith("timm/"):
            self.model = timm_model(name.removeprefix("timm/"), weights, image_size)
            self.image_size = image_size or self.model.pretrained_cfg["input_size"][-1]
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(self.model.pretrained_cfg[key]).view(-1, 1, 1), persistent=False)
        else:
            self.model = (encoders if name in encoders.presets() else tokenizers).load(name, weights)
            self.image_size = self.model.info.image_size
        self.requires_grad_(False).eval()
        self.num_features, self.width = self(torch.zeros(1, 3, self.image_size, self.image_size)).shape[1:]

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        if not self.name.startswith("timm/"):
            return self.model.features(images, **({} if self.layer is None else {"layer": self.layer}))
        images = (images - self.mean) / self.std
        if self.layer is None:
            return self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
        chosen = self.model.forward_intermediates(
            images, indices=[self.layer], output_fmt="NLC", intermediates_only=True
        )
        return chosen[0]


def timm_model(name: str, weights: str | Path | None, image_size: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ZooError(f"timm has no model '{name}'; timm.list_models() lists them.")
    size = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(
            name, pretrained=weights is None, checkpoint_path=str(weights or ""), num_classes=0, **size
        )
    except (OSError, RuntimeError) as error:
        raise ZooError(f"the weights of timm's {name} cannot be had ({error}); name a file of them.") from error
