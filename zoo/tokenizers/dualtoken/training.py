"""Training of DualToken, as its published code does it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError, nearest
from zoo.losses.adversarial import ResidualPatchDiscriminator, adaptive_weight, discriminator_loss
from zoo.nn.precision import wide
from zoo.tokenizers.dualtoken.tokenizer import DualTokenOutput, DualTokenTokenizer
from zoo.tokenizers.siglip.encoder import SigLIPEncoder
from zoo.training.autoencoder import AutoencoderTraining
from zoo.training.module import Losses


class DualTokenTraining(AutoencoderTraining):
    """A step of the tokenizer, then one of the discriminator on the same reconstructions.

    The loss is the weighted sum of these terms. Towards a frozen teacher, the tower as it was: `features_mse` and
    `features_cosine` of the quantised features against those of its last layer but one, `pooled_mse` and
    `pooled_cosine` of the embedding of the image; cosines are negative. `quantizer_STREAM` of each stream; `pixels` and
    `lpips` of the reconstruction.

    Args:
        teacher: the SigLIP encoder that the tokenizer is made on, with its weights.
        started_from: the file that the tokenizer was loaded from; None: its towers begin as the teacher's.
        frozen_layers: patches, positions and that many first layers of the tower do not learn; -1: all do. The text
            tower never does, so that texts keep their places.
        train_pixels: False: the pixel stream, its codes included, and the decoder do not learn.
        weights: of the terms; those left out are 0.
        adversarial_weight: factor of the adaptive weight, and of the discriminator's loss after its first epoch.
        adaptive_bounds: of the adaptive weight.
        others: of AutoencoderTraining.

    Raises:
        ZooError: a teacher of other sizes, an unknown term, or more layers than there are.
    """

    Discriminator = ResidualPatchDiscriminator

    def __init__(
        self,
        tokenizer: DualTokenTokenizer,
        teacher: SigLIPEncoder,
        weights: Mapping[str, float],
        started_from: str | None = None,
        frozen_layers: int = -1,
        train_pixels: bool = True,
        loss: str = "mse",
        adaptive_bounds: tuple[float, float] = (0.3, 10.0),
        **arguments,
    ):
        super().__init__(tokenizer, loss=loss, perceptual_weight=weights.get("lpips", 0.0), **arguments)
        terms = [f"{of}_{kind}" for of in ("features", "pooled") for kind in ("mse", "cosine")]
        terms += [*(f"quantizer_{name}" for name in tokenizer.info.streams), "pixels", "lpips"]
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        for name in self.weights:
            if name not in terms:
                raise ZooError(f"the loss has no term '{name}'{nearest(name, terms)}")
        self.adaptive_bounds, self.train_pixels = tuple(adaptive_bounds), train_pixels
        own = tokenizer.encoder
        if teacher.config != own.config:
            raise ZooError(
                f"the teacher {teacher.info.name} has other sizes than the towers of {tokenizer.info.name}: "
                f"{teacher.config} and {own.config}; choose the encoder that the tokenizer is made on."
            )
        if started_from is None:
            own.load_state_dict(teacher.state_dict())
        self.teacher = teacher.vision.requires_grad_(False)
        freeze(tokenizer, frozen_layers, train_pixels)
        self.train()  # Lightning leaves modes as they are

    def train(self, mode: bool = True) -> DualTokenTraining:
        super().train(mode)
        self.teacher.eval()
        if not self.train_pixels:
            self.tokenizer.quantizers["pixel"].eval()
        return self

    def values(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def regularized(self, values: Tensor) -> DualTokenOutput:
        return self.tokenizer(values, decode=self.train_pixels)

    def steps(self, values: Tensor, output: DualTokenOutput) -> Losses:
        terms = self.terms(output, values)
        loss = sum(self.weights[name] * term for name, term in terms.items() if name in self.weights)
        logs = dict(terms)
        counts = self.discriminator is not None and self.global_step >= self.adversarial_start
        if counts:
            self.discriminator.requires_grad_(False)  # it needs no gradient here, and under DDP must have none
            adversarial = -self.discriminator(output.reconstruction).mean()
            # both with weight 1, whatever theirs in the loss are
            reconstruction = terms["pixels"] + terms.get("lpips", 0)
            weight = adaptive_weight(reconstruction, adversarial, self.last_layer, *self.adaptive_bounds)
            loss = loss + weight * self.adversarial_weight * adversarial
            logs |= {"adversarial": adversarial, "adversarial_weight": weight}
        yield "tokenizer", loss, {name: value.detach() for name, value in (logs | {"loss": loss}).items()}
        if counts:
            self.discriminator.requires_grad_(True)
            real, fake = self.discriminator(values), self.discriminator(output.reconstruction.detach())
            yield "discriminator", *discriminator_loss(real, fake, self.discriminator_factor(), slope=0.01)

    def terms(self, output: DualTokenOutput, values: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name, without their weights."""
        features, pooled = self.taught(values)
        terms = distances("features", output.features, features) | distances("pooled", output.pooled, pooled)
        terms |= {f"quantizer_{name}": quantized.loss for name, quantized in output.quantized.items()}
        if output.reconstruction is not None:
            terms["pixels"] = self.loss(output.reconstruction, values)
            if self.perceptual is not None:
                terms["lpips"] = self.perceptual(output.reconstruction, values).mean()
        return terms

    @torch.no_grad()
    def taught(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features (B, N, D) of its last layer but one, and its embedding (B, D), not normalised."""
        last = len(self.teacher.blocks) - 1
        features = self.teacher.layers(self.teacher.embed(values), stop=last)
        return features, self.teacher.pool(self.teacher.layers(features, start=last))

    def discriminator_factor(self) -> float:
        """1 in the epoch in which the discriminator begins, its weight afterwards."""
        batches = self.trainer.num_training_batches
        first = 0 if math.isinf(batches) else self.adversarial_start * self.accumulate // batches
        return 1.0 if self.current_epoch == first else self.adversarial_weight

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        values = self.values(batch["image"])
        output, (features, pooled) = self.tokenizer(values, decode=False), self.taught(values)
        scores = distances("features", output.features, features) | distances("pooled", output.pooled, pooled)
        self.log_dict({f"val/{n}": score for n, score in scores.items()}, batch_size=len(values), sync_dist=True)


def distances(name: str, given: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Mean squared error, and minus the mean cosine similarity of the last axis, in float32."""
    given, wanted = wide(given), wide(wanted)
    return {
        f"{name}_mse": F.mse_loss(given, wanted),
        f"{name}_cosine": -F.cosine_similarity(given, wanted, dim=-1).mean(),
    }


def freeze(tokenizer: DualTokenTokenizer, layers: int, pixels: bool) -> None:
    """Freeze the text tower, patches and first layers of the other (-1: none), and with pixels=False that stream."""
    depth = tokenizer.config.encoder.depth
    if not -1 <= layers <= depth:
        raise ZooError(f"frozen_layers must be -1 for none, or 0 to {depth}, got {layers}.")
    if not pixels and tokenizer.config.one_codebook:
        raise ZooError("train_pixels=false needs a pixel stream of its own, and this tokenizer has one_codebook.")
    for part in frozen(tokenizer, layers, pixels):
        part.requires_grad_(False)


def frozen(tokenizer: DualTokenTokenizer, layers: int, pixels: bool) -> Iterator[nn.Module | nn.Parameter]:
    encoder, tower = tokenizer.encoder, tokenizer.encoder.vision
    yield from (encoder.text, encoder.logit_scale, encoder.logit_bias)
    if layers >= 0:
        yield from (tower.patch_embed, tower.pos_embed, tower.blocks[:layers])
    if not pixels:
        names = "prequant_pixel", "prequant_shortcut", "postquant_pixel", "bridge", "decoder"
        yield from (part for name, part in tokenizer.named_children() if name in names)
