"""Training of autoencoders: pixels, LPIPS and a patch discriminator."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from zoo.losses import reconstruction_loss
from zoo.losses.adversarial import PatchDiscriminator, discriminator_loss, generator_loss
from zoo.losses.perceptual import PerceptualLoss
from zoo.tokenizer import Tokenizer
from zoo.training.module import Losses, TrainingModule


class Regularized(NamedTuple):
    """What a tokenizer makes of values, and what that costs beside the reconstruction."""

    reconstruction: Tensor
    """(B, C, H, W) values."""
    loss: Tensor
    """Scalar: on what is between the networks."""
    codes: Tensor | None
    """(B, N, D) quantised vectors in raster order, with gradient; None where nothing is quantised."""
    logs: dict[str, Tensor]
    """More scalars to log."""


class AutoencoderTraining(TrainingModule):
    """The recipe of VQGAN and latent diffusion (arXiv 2012.09841, 2112.10752) around what `regularized` adds.

    Each batch steps the discriminator, once it counts, and then the autoencoder.

    Args:
        loss: of pixels, a name of zoo.losses.RECONSTRUCTION.
        perceptual_weight: of LPIPS; 0: left out.
        perceptual_weights: a file with all of LPIPS; None: torchvision's VGG16 from the cache of torch.hub.
        adversarial_weight: factor of the adaptive weight; 0: there is no discriminator.
        adversarial_start: step from which the discriminator counts.
        discriminator_width: channels of its first layer.
        others: of TrainingModule.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: str = "l1",
        perceptual_weight: float = 0.0,
        perceptual_weights: str | Path | None = None,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 0,
        discriminator_width: int = 64,
        **arguments,
    ):
        super().__init__(tokenizer, **arguments)
        self.loss, self.perceptual_weight = reconstruction_loss(loss), perceptual_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.perceptual = PerceptualLoss.pretrained(perceptual_weights) if perceptual_weight else None
        self.discriminator = PatchDiscriminator(width=discriminator_width) if adversarial_weight else None

    def regularized(self, values: Tensor) -> Regularized:
        """Values (B, C, H, W) through the tokenizer."""
        raise NotImplementedError

    def values(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to what the tokenizer's networks read."""
        return self.tokenizer.config.to_values(images)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradient balances the discriminator."""
        return self.tokenizer.decoder.conv_out.weight

    def optimized(self) -> dict[str, nn.Module]:
        modules = {"tokenizer": self.tokenizer}
        return modules | ({"discriminator": self.discriminator} if self.discriminator else {})

    @property
    def discriminates(self) -> bool:
        """Whether there is a discriminator that counts by now."""
        return self.discriminator is not None and self.global_step >= self.adversarial_start

    def losses(self, batch: dict) -> Losses:
        values = self.values(batch["image"])
        yield from self.steps(values, self.regularized(values))

    def steps(self, values: Tensor, made: Regularized) -> Losses:
        """The losses of values (B, C, H, W) and of what `regularized` made of them."""
        if self.discriminates:
            yield "discriminator", *self.discriminator_loss(values, made.reconstruction)
        yield "tokenizer", *self.autoencoder_loss(values, made)

    def discriminator_loss(self, values: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of telling values from their reconstruction (B, C, H, W), and what to log."""
        self.discriminator.requires_grad_(True)
        return discriminator_loss(self.discriminator(values), self.discriminator(reconstruction.detach()), 1.0)

    def autoencoder_loss(self, values: Tensor, made: Regularized) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the reconstruction and of what is between, and what to log."""
        reconstruction, perceptual = made.reconstruction, None
        pixels = self.loss(reconstruction, values)
        if self.perceptual is not None:
            perceptual = self.perceptual_weight * self.perceptual(reconstruction, values)
        if self.discriminates:
            self.discriminator.requires_grad_(False)  # it needs no gradient here, and under DDP must have none
            fake = self.discriminator(reconstruction)
            total, logs = generator_loss(pixels, perceptual, fake, self.last_layer, self.adversarial_weight, 1.0)
        else:
            total, logs = pixels if perceptual is None else pixels + perceptual.mean(), {"pixels": pixels}
        total = total + made.loss
        return total, {name: value.detach() for name, value in ({"loss": total} | logs | made.logs).items()}
