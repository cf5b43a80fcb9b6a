"""Training of autoencoders: pixels, LPIPS and a patch discriminator."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from zoo import weights as files
from zoo.errors import ZooError, nearest
from zoo.losses import reconstruction_loss
from zoo.losses.adversarial import GENERATOR, LeCam, PatchDiscriminator, discriminator_loss, generator_loss
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
        adaptive: False: adversarial_weight is the weight itself.
        adversarial: what the autoencoder does against the discriminator, a name of zoo.losses.adversarial.GENERATOR.
        adversarial_start: step from which the discriminator counts.
        lecam_weight: of the regulariser LeCam in the loss of the discriminator; 0: left out.
        discriminator_width: channels of its first layer.
        discriminator_weights: a file that it starts from: a checkpoint of a training, the zoo's own or the authors'.
        others: of TrainingModule.
    """

    Discriminator: type[nn.Module] = PatchDiscriminator

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: str = "l1",
        perceptual_weight: float = 0.0,
        perceptual_weights: str | Path | None = None,
        adversarial_weight: float = 0.0,
        adaptive: bool = True,
        adversarial: str = "linear",
        adversarial_start: int = 0,
        lecam_weight: float = 0.0,
        discriminator_width: int = 64,
        discriminator_weights: str | Path | None = None,
        **arguments,
    ):
        super().__init__(tokenizer, **arguments)
        self.loss, self.perceptual_weight = reconstruction_loss(loss), perceptual_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        if adversarial not in GENERATOR:
            raise ZooError(f"no adversarial loss is called '{adversarial}'{nearest(adversarial, GENERATOR)}")
        self.adaptive, self.adversarial, self.lecam_weight = adaptive, adversarial, lecam_weight
        self.perceptual = PerceptualLoss.pretrained(perceptual_weights) if perceptual_weight else None
        self.discriminator = self.Discriminator(width=discriminator_width) if adversarial_weight else None
        if discriminator_weights is not None:
            if self.discriminator is None:
                raise ZooError("discriminator_weights needs an adversarial_weight above 0: there is no discriminator.")
            load_discriminator(self.discriminator, discriminator_weights)
        self.lecam = LeCam() if lecam_weight else None

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
        real, fake = self.discriminator(values), self.discriminator(reconstruction.detach())
        loss, logs = discriminator_loss(real, fake, 1.0)
        if self.lecam is None:
            return loss, logs
        lecam = self.lecam(real, fake)
        return loss + self.lecam_weight * lecam, logs | {"lecam": lecam.detach()}

    def autoencoder_loss(self, values: Tensor, made: Regularized) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the reconstruction and of what is between, and what to log."""
        reconstruction, perceptual = made.reconstruction, None
        pixels = self.loss(reconstruction, values)
        if self.perceptual is not None:
            perceptual = self.perceptual_weight * self.perceptual(reconstruction, values)
        if self.discriminates:
            self.discriminator.requires_grad_(False)  # it needs no gradient here, and under DDP must have none
            fake = self.discriminator(reconstruction)
            kind = self.adversarial, self.adaptive
            total, logs = generator_loss(pixels, perceptual, fake, self.last_layer, self.adversarial_weight, 1.0, *kind)
        else:
            logs = {"pixels": pixels} | ({} if perceptual is None else {"lpips": perceptual.mean()})
            total = sum(logs.values())
        total = total + made.loss
        return total, {name: value.detach() for name, value in ({"loss": total} | logs | made.logs).items()}


def load_discriminator(discriminator: nn.Module, path: str | Path) -> None:
    """Take what lies below `discriminator.` in a checkpoint. Raises ZooError for a file that does not fit."""
    state = files.read(path, part="discriminator")[0]
    state = {n.rpartition("discriminator.")[2]: tensor for n, tensor in state.items() if "discriminator." in n}
    files.load(discriminator, state, path)
