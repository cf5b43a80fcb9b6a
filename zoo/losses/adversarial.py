"""The patch discriminator and the losses of VQGAN (arXiv 2012.09841, section 3.2) and its descendants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.distributed import sum_over_ranks, world_size
from zoo.errors import ZooError
from zoo.nn.normalization import BatchNorm2d
from zoo.nn.precision import wide

GROUPS = 32
"""Of the residual discriminator's normalisation."""
SCALE = 2.0**10
"""Of losses whose gradients are measured: those of a mean over all pixels would vanish in float16."""


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images (B, 3, H, W) to logits (B, 1, H / 8 - 2, W / 8 - 2), real above fake.

    Batch statistics are those of all ranks.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3):
        super().__init__()
        layers, inner = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)], width
        for i in range(1, num_layers + 1):
            outer, stride = width * min(2**i, 8), 2 if i < num_layers else 1
            conv = nn.Conv2d(inner, outer, 4, stride, 1, bias=False)
            layers += [conv, BatchNorm2d(outer), nn.LeakyReLU(0.2)]
            inner = outer
        self.main = nn.Sequential(*layers, nn.Conv2d(inner, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return wide(self.main(images))  # losses are means of many


class ResidualPatchDiscriminator(nn.Module):
    """DualToken's: images (B, 3, H, W) to logits (B, 1, H / 8, W / 8), rounded up; real above fake.

    GroupNorm in residual blocks instead of PatchDiscriminator's BatchNorm: no image depends on its batch. width is a
    multiple of 32; all but the last of num_layers blocks halve the resolution, as the first convolution does.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3):
        super().__init__()
        if width < 1 or width % GROUPS:
            raise ZooError(f"the residual discriminator's width must be a multiple of {GROUPS}, got {width}.")
        layers, inner = [nn.Conv2d(in_channels, width, 3, 2, 1), nn.LeakyReLU(0.2)], width
        for i in range(1, num_layers + 1):
            outer = width * min(2**i, 8)
            layers.append(ResidualBlock(inner, outer, stride=2 if i < num_layers else 1))
            inner = outer
        self.main = nn.Sequential(*layers, nn.Conv2d(inner, 1, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return wide(self.main(images))  # losses are means of many


class ResidualBlock(nn.Module):
    """x + conv(leaky(norm(x))), where x is resized bilinearly and widened by a 1 x 1 convolution if it must be."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        if x.shape[2:] != h.shape[2:]:
            x = F.interpolate(x, h.shape[2:], mode="bilinear")
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


def hinge_loss(real: Tensor, fake: Tensor, slope: float = 0.0) -> Tensor:
    """0.5 (mean relu(1 - real) + mean relu(1 + fake)) of logits; slope: of the relu below 0 (DualToken: 0.01)."""
    return 0.5 * (F.leaky_relu(1 - real, slope).mean() + F.leaky_relu(1 + fake, slope).mean())


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, layer: Tensor, low: float = 0.0, high: float = 1e4
) -> Tensor:
    """|grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-4), within low..high, without gradient.

    Gradients are those of the decoder's last layer, averaged over ranks, so that all ranks have the same weight.
    """
    losses = SCALE * reconstruction, SCALE * adversarial
    grads = [torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in losses]
    of_reconstruction, of_adversarial = (g.norm() / world_size() / SCALE for g in sum_over_ranks(*grads))
    return (of_reconstruction / (of_adversarial + 1e-4)).clamp(low, high).detach()


def linear_loss(logits_fake: Tensor) -> Tensor:
    """-mean(logits), what a generator does against the hinge loss."""
    return -logits_fake.mean()


def non_saturating_loss(logits_fake: Tensor) -> Tensor:
    """mean of softplus(-m), m the mean logit of an image (IBQ); logits (B, ...)."""
    return F.softplus(-logits_fake.flatten(1).mean(1)).mean()


GENERATOR = {"linear": linear_loss, "non_saturating": non_saturating_loss}


def generator_loss(
    pixels: Tensor,
    perceptual: Tensor | None,
    logits_fake: Tensor,
    last_layer: Tensor,
    weight: float,
    factor: float,
    adversarial: str = "linear",
    adaptive: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """pixels + LPIPS + factor * w * adversarial, with w = weight * adaptive_weight, or the weight itself.

    pixels: loss of the reconstruction, scalar; perceptual: LPIPS of each image (B, 1, 1, 1), None: left out;
    logits_fake: of the discriminator on the reconstructions; factor: 0 before the discriminator counts, else 1;
    adversarial: a name of GENERATOR.
    """
    lpips = pixels.new_zeros(()) if perceptual is None else perceptual.mean()
    nll = pixels + lpips
    term = GENERATOR[adversarial](logits_fake)
    weight = weight * (adaptive_weight(nll, term, last_layer) if adaptive else torch.ones_like(pixels))
    loss = nll + factor * weight * term
    logs = {"nll": nll, "pixels": pixels, "lpips": lpips, "adversarial": term, "adversarial_weight": weight}
    return loss, {name: value.detach() for name, value in logs.items()}


def discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, factor: float, slope: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """factor * hinge_loss with that slope, and what to log."""
    loss = factor * hinge_loss(logits_real, logits_fake, slope)
    logs = {"discriminator": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    return loss, {name: value.detach() for name, value in logs.items()}


class LeCam(nn.Module):
    """Regulariser of a discriminator (arXiv 2104.03310): mean relu(real - f)^2 + mean relu(r - fake)^2 of its logits,
    with r and f the running means of real and fake ones.

    In training mode they move first: r <- decay * r + (1 - decay) * mean(real), over all ranks, from 0. They are
    buffers, so a run that is resumed goes on with them (IBQ's were not saved and began at 0 again).
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        if self.training:
            means = sum_over_ranks(wide(logits_real.detach().mean()), wide(logits_fake.detach().mean()))
            for running, mean in zip((self.real, self.fake), means, strict=True):
                running.copy_(wide(running).lerp(mean / world_size(), 1 - self.decay))
        of_real, of_fake = F.relu(logits_real - self.fake), F.relu(self.real - logits_fake)
        return of_real.square().mean() + of_fake.square().mean()
