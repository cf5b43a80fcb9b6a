"""Frozen networks whose features a tokenizer learns to predict."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import weights as files
from zoo.errors import ZooError
from zoo.registry import encoders, tokenizers


class Teacher(nn.Module):
    """Patch features (B, N, D) of images (B, 3, H, W) in [0, 1], which are resized to the size it was made for.

    Args:
        name: an encoder of the zoo, a tokenizer of the zoo that has features, or "timm/NAME" for a vision transformer
            of timm.
        weights: a file, where the name alone has none. For timm: with timm's names of parameters.
        layer: after how many blocks the features are taken, as they are; None: after the last one and its norm.
            Tokenizers have the last alone.
        image_size: of a model of timm that takes others than its own.

    Raises:
        ZooError: an unknown name, a model without patch features, a layer it has not, or weights that cannot be had.
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
            if layer is not None and not 0 < layer <= len(self.model.blocks):
                raise ZooError(f"{name} has layers 1..{len(self.model.blocks)}, got {layer}.")
            self.image_size = image_size or self.model.pretrained_cfg["input_size"][-1]
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(self.model.pretrained_cfg[key]).view(-1, 1, 1), persistent=False)
        else:
            self.model = (encoders if name in encoders.presets() else tokenizers).load(name, weights)
            self.image_size = self.model.info.image_size
            if layer is not None and name not in encoders.presets():
                raise ZooError(f"a tokenizer has the features of its last layer alone; leave out layer={layer}.")
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
            # without the checks of `features`, which would wait for the device in each training step
            return self.model._features(images, **({} if self.layer is None else {"layer": self.layer}))
        images = (images - self.mean) / self.std
        if self.layer is None:
            return self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
        chosen = self.model.forward_intermediates(
            images, indices=[self.layer - 1], output_fmt="NLC", intermediates_only=True
        )
        return chosen[0]


def timm_model(name: str, weights: str | Path | None, image_size: int | None) -> nn.Module:
    """A vision transformer of timm with its published weights, or with those of a file. Raises ZooError."""
    import timm
    from timm.models import VisionTransformer

    if not timm.is_model(name):
        raise ZooError(f"timm has no model '{name}'; timm.list_models('vit*') lists those that serve.")
    size = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=weights is None, num_classes=0, **size)
    except (OSError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ZooError(
            f"timm's {name} cannot be made with its published weights ({reason}); fetch them where there is a network "
            "and name the file with weights=."
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ZooError(f"timm's {name} has no features of patches that are known here; choose a vision transformer.")
    if weights is not None:
        path = files.locate(weights, name)
        state = {key: tensor for key, tensor in files.read(path)[0].items() if not key.startswith("head.")}
        files.load(model, state, path)
    return model
