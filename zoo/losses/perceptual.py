"""LPIPS on VGG16 as a training loss (arXiv 1801.03924, in the form of VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from zoo import weights as files
from zoo.errors import ZooError

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)


class PerceptualLoss(nn.Module):
    """Distance of images to images on the features relu1_2, 2_2, 3_3, 4_3 and 5_3; frozen, and the names of the field.

    Images are expected in [-1, 1]. dropout: the linear heads' dropout of 0.5 acts in training mode, which happens by
    accident in the code of many authors.
    """

    def __init__(self, dropout: bool = False):
        super().__init__()
        self.dropout = dropout
        self.scaling_layer = nn.Module()
        for name, values in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
            self.scaling_layer.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.net, inner, number = nn.Module(), 3, 0  # numbers are those of torchvision's vgg16().features
        for i, (width, count) in enumerate(zip(WIDTHS, CONVOLUTIONS, strict=True)):
            layers = nn.Sequential()
            if i:
                layers.add_module(str(number), nn.MaxPool2d(2))
                number += 1
            for _ in range(count):
                layers.add_module(str(number), nn.Conv2d(inner, width, 3, padding=1))
                layers.add_module(str(number + 1), nn.ReLU())
                inner, number = width, number + 2
            self.net.add_module(f"slice{i + 1}", layers)
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", head)
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> PerceptualLoss:
        return super().train(mode and self.dropout)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] to the five feature maps, before their normalisation."""
        x, found = (images - self.scaling_layer.shift) / self.scaling_layer.scale, []
        for layers in self.net.children():
            x = layers(x)
            found.append(x)
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] to their distances (B, 1, 1, 1).

        Under autocast features alone are in half precision: squares of small differences would vanish in float16.
        """
        pairs, total = zip(self.features(images), self.features(others), strict=True), 0
        with torch.autocast(images.device.type, enabled=False):
            for i, pair in enumerate(pairs):
                head = getattr(self, f"lin{i}").model
                pair = [f.to(head[1].weight.dtype) for f in pair]
                one, other = (f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in pair)
                total = total + head((one - other).square()).mean((2, 3), keepdim=True)
        return total

    @classmethod
    def pretrained(cls, path: str | Path | None = None, dropout: bool = False) -> PerceptualLoss:
        """With trained weights: one file with all of them, under the names of this class (alone or below
        `perceptual_loss.`); or, without a path, torchvision's VGG16 from the cache of torch.hub and the linear heads
        that torchmetrics brings.

        Raises ZooError when a file is missing or does not fit; nothing is downloaded.
        """
        loss = cls(dropout)
        if path is not None:
            state = {n.rpartition("perceptual_loss.")[2]: t for n, t in files.read(path)[0].items()}
            state = {name: tensor for name, tensor in state.items() if name.startswith(("net.", "lin", "scaling"))}
            files.load(loss, loss.scaling_layer.state_dict(prefix="scaling_layer.") | state, path)
            return loss
        import torchmetrics

        vgg, source = files.read(files.published_file(VGG16))[0], f"{VGG16} with torchmetrics' heads"
        inner = {name: name.split(".")[-2] for name in loss.state_dict() if name.startswith("net.")}
        try:
            state = {name: vgg[f"features.{number}.{name.split('.')[-1]}"] for name, number in inner.items()}
        except KeyError as error:
            raise ZooError(f"the file of {VGG16} is no VGG16 of torchvision: it lacks {error}.") from error
        heads = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
        state |= {n: t for n, t in files.read(heads)[0].items() if n.startswith("lin")}
        files.load(loss, loss.scaling_layer.state_dict(prefix="scaling_layer.") | state, source)
        return loss
