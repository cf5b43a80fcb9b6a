"""Training of KARL (section 3.2 of the paper and the authors' two scripts).

Every iteration has two phases. The first gives all images the same number of tokens, drops none, and measures the
error that each reaches. The second asks for exactly that error with more queries than were needed, and teaches those
beyond the number of the first phase to halt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.distributed import min_over_ranks, world_size
from zoo.errors import ZooError
from zoo.losses.adversarial import PatchDiscriminator, discriminator_loss, generator_loss
from zoo.losses.perceptual import PerceptualLoss
from zoo.nn.autoencoder import to_tokens
from zoo.nn.precision import wide
from zoo.registry import has_weights, load_tokenizer, preset
from zoo.tokenizers.karl.tokenizer import KarlTokenizer, halting_mask
from zoo.tokenizers.vqgan.tokenizer import VQGANTokenizer
from zoo.training.module import Losses, TrainingModule

Logs = dict[str, Tensor]


class Phase(NamedTuple):
    """What one pass through KARL gives."""

    halt_logits: Tensor
    """(B, T)"""
    z: Tensor
    """(B, T, d): latents before the quantizer."""
    ids: Tensor | None
    """(B, T) int64."""
    quantizer_loss: Tensor
    output: Tensor
    """(B, N, O): what the decoder wrote."""
    code: Tensor
    """(B, E, h, w): code of the base."""


class Iteration(NamedTuple):
    """What the two phases of an iteration give."""

    loss: Tensor
    logs: Logs
    first: Phase
    second: Phase
    errors: Tensor
    """(B,): mean absolute error that each image reached in the first phase."""


def karl_pass(tokenizer: KarlTokenizer, grid: Tensor, bins: Tensor, length: int, mask_order: str | None) -> Phase:
    """grid_tokens (B, W, h, w) and quality bins (B,) through encoder and decoder, with `length` tokens.

    mask_order: None: no token is dropped; "per_image": each image drops its own; "official": what the authors' code
    does in a batch, where head h of image b drops those of image (b * heads + h) mod B.
    """
    places = grid.shape[2:]
    logits, z = tokenizer.encoder(grid, bins, length)
    quantized = tokenizer.quantize(z)
    latents = z if quantized is None else quantized.quantized
    mask = None
    if mask_order:
        mask = halting_mask(~tokenizer.halts(logits), places.numel())
        heads = tokenizer.config.decoder_heads
        if mask_order == "official":
            mask = mask[torch.arange(len(mask) * heads, device=mask.device) % len(mask)].unflatten(0, (-1, heads))
        else:
            mask = mask[:, None]
    output = tokenizer.decoder(latents, places, mask=mask)
    return Phase(
        logits,
        z,
        None if quantized is None else quantized.ids,
        z.new_zeros(()) if quantized is None else quantized.loss,
        output,
        tokenizer.code_map(output, places),
    )


def halting_loss(logits: Tensor, num_halted: int) -> Logs:
    """Cross entropies of halting logits (B, T): the last num_halted tokens should halt, the others should not."""
    logits = wide(logits)
    active, halted = logits[:, : logits.shape[1] - num_halted], logits[:, logits.shape[1] - num_halted :]
    losses = {"active": F.binary_cross_entropy_with_logits(active, torch.zeros_like(active))}
    if num_halted:
        losses["halted"] = F.binary_cross_entropy_with_logits(halted, torch.ones_like(halted))
    return losses


class QualityDistribution(nn.Module):
    """The running distribution over quality bins from which the first phase draws.

    It starts uniform over the errors up to `start`. After each batch bins that are not below the smallest error that
    an image reached become rarer by `decay`: they ask for less than the model can do.
    """

    def __init__(self, bins: tuple[float, ...], start: float = 0.04, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        values = torch.tensor(bins, dtype=torch.float32)
        first = (values <= start).float()
        if not first.any():
            first[0] = 1
        self.register_buffer("values", values)
        self.register_buffer("probabilities", first / first.sum())

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count,) int64 bins."""
        return torch.multinomial(self.probabilities, count, replacement=True, generator=generator)

    @torch.no_grad()
    def update(self, errors: Tensor) -> None:
        """errors: (B,) of this rank's images; the smallest of all ranks counts."""
        reached = min_over_ranks(errors.float().min())
        weighted = self.probabilities.where(self.values < reached, self.probabilities * self.decay)
        self.probabilities.copy_(weighted / weighted.sum())


class KarlTraining(TrainingModule):
    """What both stages share: the two phases, halting and quantizer losses. All weights of the sum are 1.

    Args:
        budget_step: the first phase draws its number of tokens from budget_step, 2 * budget_step, ... up to the
            tokenizer's trained_slots.
        mask_order: "per_image" or "official", see karl_pass; the released models were trained with "official".
        others: of TrainingModule.
    """

    def __init__(self, tokenizer: KarlTokenizer, budget_step: int = 16, mask_order: str = "per_image", **arguments):
        super().__init__(tokenizer, **arguments)
        if mask_order not in ("per_image", "official"):
            raise ZooError(f"module.mask_order must be 'per_image' or 'official', got {mask_order!r}.")
        if not 1 <= budget_step <= tokenizer.config.trained_slots:
            raise ZooError(
                f"module.budget_step must be from 1 to trained_slots={tokenizer.config.trained_slots}, "
                f"got {budget_step}."
            )
        self.budget_step, self.mask_order = budget_step, mask_order
        self.quality = QualityDistribution(tokenizer.config.quality_bins)
        if isinstance(tokenizer.base, VQGANTokenizer):
            tokenizer.base.quantizer.requires_grad_(False)  # in both stages it stays as it was

    def compiled(self) -> list[nn.Module]:
        tokenizer = self.tokenizer
        return [tokenizer.encoder, tokenizer.decoder, tokenizer.base.encoder, tokenizer.base.decoder]

    def losses(self, batch: dict) -> Losses:
        budget, bins, noise = self.draws(batch["image"])
        iteration = self.both_phases(batch["image"], budget, bins, noise)
        yield "tokenizer", iteration.loss, iteration.logs

    def draws(self, images: Tensor) -> tuple[int, Tensor, Tensor | None]:
        """Tokens and bins (B,) of the first phase, and noise of the KL autoencoder (B, E, h, w) or None.

        The number of tokens is one for all ranks; what belongs to an image does not depend on the number of ranks.
        """
        generator = self.shared_generator(images.device)
        step, c = self.budget_step, self.tokenizer.config
        budget = step * random.Random(generator.initial_seed()).randint(1, c.trained_slots // step)
        count = len(images) * world_size()
        bins = self.own_rows(self.quality.draw(count, generator))
        if isinstance(self.tokenizer.base, VQGANTokenizer):
            return budget, bins, None
        shape = (count, c.base.embed_dim, *(side // c.base.downsample for side in images.shape[2:]))
        return budget, bins, self.own_rows(torch.randn(shape, device=images.device, generator=generator))

    def both_phases(self, images: Tensor, budget: int, bins: Tensor, noise: Tensor | None = None) -> Iteration:
        """An iteration without its step.

        images: (B, 3, H, W) in [0, 1]; budget: tokens of the first phase; bins: (B,) its quality bins; noise: see
        KarlTokenizer.base_features, the same in both phases.
        """
        tokenizer = self.tokenizer
        features = tokenizer.base_features(images, noise=noise)
        grid, target = tokenizer.encoder.grid_tokens(images, features), self.target(features)
        available = tokenizer.config.max_tokens
        superfluous = max(0, available - budget)

        first = karl_pass(tokenizer, grid, bins, budget, None)
        losses = halting_loss(first.halt_logits, 0) | {"quantizer": first.quantizer_loss}
        extra, logs, reconstruction = self.reconstruction(images, target, first, budget)
        with torch.no_grad():
            if reconstruction is None:
                reconstruction = tokenizer.decode_code(first.code)
            errors = (images - reconstruction).abs().flatten(1).mean(1)
            self.quality.update(errors)
        phases = {"estimate": (losses | extra, logs)}

        second = karl_pass(tokenizer, grid, tokenizer.quality_bin(errors), available, self.mask_order)
        losses = halting_loss(second.halt_logits, superfluous) | {"quantizer": second.quantizer_loss}
        extra, logs, _ = self.reconstruction(images, target, second, available - superfluous)
        phases["tokenize"] = losses | extra, logs

        with torch.enable_grad():  # in a pass of the discriminators only their losses have a gradient
            total = torch.stack([loss for losses, _ in phases.values() for loss in losses.values()]).sum()
        scalars = {"loss": total, "error": errors.mean(), "kept": (~tokenizer.halts(second.halt_logits)).float().mean()}
        for phase, (losses, logs) in phases.items():
            scalars |= {f"{phase}/{name}": value for name, value in (losses | logs).items()}
        return Iteration(total, {name: value.detach() for name, value in scalars.items()}, first, second, errors)

    def target(self, features: Tensor) -> Tensor | None:
        """What the decoder should write, from the features of the base; None where the loss is on pixels."""
        return None

    def reconstruction(
        self, images: Tensor, target: Tensor | None, phase: Phase, num_tokens: int
    ) -> tuple[Logs, Logs, Tensor | None]:
        """Terms of the loss of a pass, more to log, and the values (B, 3, H, W) if they were decoded.

        num_tokens: that should be live.
        """
        raise NotImplementedError

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Error and tokens at the tokenizer's own quality; val/mse and val/psnr are those of all tokens."""
        images, tokenizer = batch["image"], self.tokenizer
        settings = {"sample_posterior": False}
        tokens = tokenizer.encode(images, **settings)
        error = (tokenizer.decode(tokens) - images).abs().mean()
        full = tokenizer.reconstruct(images, num_tokens=tokenizer.config.max_tokens, **settings)
        mse = (full - images).square().flatten(1).mean(1)
        scores = {"val/mse": mse.mean(), "val/psnr": (-10 * mse.clamp(min=1e-10).log10()).mean()}
        scores |= {"val/error": error, "val/tokens": tokens.lengths.float().mean()}
        self.log_dict(scores, batch_size=len(images), sync_dist=True, prog_bar=True)


class KarlPretraining(KarlTraining):
    """Stage 1, latent distillation: the base is frozen, its codes are the target.

    On a VQGAN: cross entropy of the logits against the base's ids, and squared error of the mixture of codes; on a KL
    autoencoder: squared error of the scaled latents.

    Args:
        base: name of the zoo whose weights the base takes; its sizes must be those of tokenizer.base. None: what the
            tokenizer holds, for a start from `weights`.
        base_weights: a file for it, where the name alone has none.
        others: of KarlTraining.
    """

    def __init__(self, tokenizer: KarlTokenizer, base: str | None = None, base_weights: str | None = None, **arguments):
        super().__init__(tokenizer, **arguments)
        if base is not None:
            published = preset(base)
            if base_weights is None and not has_weights(published):
                where = published.weights.manual if published.weights else "a file of your own training"
                raise ZooError(
                    f"stage 1 starts from a trained {base}: get {where}, and name it in module.base_weights."
                )
            loaded = load_tokenizer(base, base_weights)
            if loaded.config != tokenizer.config.base:
                raise ZooError(f"module.base={base} is {loaded.config}, and tokenizer.base is {tokenizer.config.base}.")
            tokenizer.base.load_state_dict(loaded.state_dict())
        tokenizer.base.requires_grad_(False)

    @torch.no_grad()
    def target(self, features: Tensor) -> Tensor:
        features = to_tokens(features)
        base = self.tokenizer.base
        return base.quantizer.encode(features) if isinstance(base, VQGANTokenizer) else features

    def reconstruction(self, images, target, phase, num_tokens):
        code = to_tokens(phase.code)
        if not isinstance(self.tokenizer.base, VQGANTokenizer):
            return {"code": F.mse_loss(code, target)}, {}, None
        nll = F.cross_entropy(wide(phase.output.flatten(0, 1)), target.flatten())
        return {"nll": nll, "code": F.mse_loss(code, self.tokenizer.base.quantizer.codebook[target])}, {}, None


class KarlFinetuning(KarlTraining):
    """Stage 2, full finetuning: everything trains, on pixels, LPIPS and patch discriminators, from the weights of
    stage 1 (`weights=`).

    While the adversarial weight of the epoch is 0 every iteration is the tokenizer's. Later all but one in
    `discriminator_every` are the discriminators'. There is one for each eighth of the number of tokens.

    Args:
        adversarial_weights: pairs of an epoch, counted from 0, and the weight from then on; before the first it is 0.
            None: as published; []: there is no adversarial loss.
        discriminator_every: see above.
        perceptual_weight: 0 leaves LPIPS out, 1 as published; it sees images in [0, 1], as published.
        perceptual_weights: a file with all of LPIPS; None: torchvision's VGG16 from the cache of torch.hub.
        perceptual_dropout: as it acts by accident in the authors' code.
        discriminator_width: channels of their first layer.
        discriminators_in_generator: the tokenizer's optimizer moves the discriminators too, unclipped, as in the
            authors' code; this lets them take generated images for real.
        others: of KarlTraining.
    """

    def __init__(
        self,
        tokenizer: KarlTokenizer,
        adversarial_weights: Sequence[Sequence[float]] | None = None,
        discriminator_every: int = 9,
        perceptual_weight: float = 1.0,
        perceptual_weights: str | Path | None = None,
        perceptual_dropout: bool = False,
        discriminators_in_generator: bool = False,
        discriminator_width: int = 64,
        **arguments,
    ):
        super().__init__(tokenizer, **arguments)
        weights = [(21, 0.2), (101, 0.8)] if adversarial_weights is None else adversarial_weights
        self.adversarial_weights = sorted((int(epoch), float(weight)) for epoch, weight in weights)
        self.discriminator_every, self.perceptual_weight = discriminator_every, perceptual_weight
        self.discriminators_in_generator = discriminators_in_generator
        self.discriminators = nn.ModuleList(PatchDiscriminator(width=discriminator_width) for _ in range(8))
        self.perceptual = None
        if perceptual_weight:
            self.perceptual = PerceptualLoss.pretrained(perceptual_weights, perceptual_dropout)
        self.adversarial_weight, self.discriminates = 0.0, False  # of the pass at hand

    def optimized(self) -> dict[str, nn.Module]:
        tokenizer = self.tokenizer
        if self.discriminators_in_generator:
            tokenizer = nn.ModuleList([tokenizer, self.discriminators])
        return {"tokenizer": tokenizer, "discriminator": self.discriminators}

    def clipped(self, name: str, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        if name == "discriminator":
            return parameters
        others = {id(p) for p in self.discriminators.parameters()}
        return [p for p in parameters if id(p) not in others]

    def losses(self, batch: dict) -> Losses:
        self.adversarial_weight = self.weight_of_epoch(self.current_epoch)
        step = self.trainer.fit_loop.epoch_loop.batch_idx // self.accumulate
        self.discriminates = self.is_discriminator_pass(step)
        name = "discriminator" if self.discriminates else "tokenizer"
        # what is not trained in this pass needs no gradients, and under DDP must have none
        with torch.set_grad_enabled(not self.discriminates):
            self.discriminators.requires_grad_(self.discriminates or self.discriminators_in_generator)
            budget, bins, noise = self.draws(batch["image"])
            iteration = self.both_phases(batch["image"], budget, bins, noise)
        yield name, iteration.loss, iteration.logs

    def weight_of_epoch(self, epoch: int) -> float:
        """Adversarial weight of an epoch, counted from 0."""
        return next((weight for first, weight in reversed(self.adversarial_weights) if epoch >= first), 0.0)

    def is_discriminator_pass(self, iteration: int) -> bool:
        """Whether iteration 0, 1, ... of an epoch is one of the discriminators, once there is an adversarial weight."""
        return self.adversarial_weight > 0 and (iteration + 1) % self.discriminator_every != 0

    def discriminator_index(self, num_tokens: int) -> int:
        """Which discriminator judges images of so many tokens."""
        eighths = num_tokens * len(self.discriminators) // self.tokenizer.config.max_tokens
        return min(max(eighths - 1, 0), len(self.discriminators) - 1)

    def reconstruction(self, images, target, phase, num_tokens):
        values = self.tokenizer.decode_code(phase.code)
        discriminator = self.discriminators[self.discriminator_index(num_tokens)]
        factor = float(self.adversarial_weight > 0)
        if self.discriminates:
            with torch.enable_grad():
                real, fake = discriminator(images), discriminator(values.detach())
                loss, logs = discriminator_loss(real, fake, factor)
            return {"image": loss}, logs, values
        pixels, perceptual = (images - values).abs().mean(), self.perceptual_distance(images, values)
        if not self.adversarial_weights:
            return {"image": pixels if perceptual is None else pixels + perceptual.mean()}, {"pixels": pixels}, values
        loss, logs = generator_loss(
            pixels,
            perceptual,
            discriminator(values),
            self.tokenizer.base.decoder.conv_out.weight,
            self.adversarial_weight or self.adversarial_weights[0][1],  # before the first epoch for the logs alone
            factor,
        )
        return {"image": loss}, logs, values

    def perceptual_distance(self, images: Tensor, values: Tensor) -> Tensor | None:
        """LPIPS (B, 1, 1, 1) times its weight."""
        return None if self.perceptual is None else self.perceptual_weight * self.perceptual(images, values)
