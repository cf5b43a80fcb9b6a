"""Training of xAR (section 3.3 of the paper and the authors' script)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.flow import interpolate, logit_normal, velocity
from zoo.nn.autoencoder import to_map
from zoo.quantizers import GaussianPosterior
from zoo.tokenizer import Tokenizer
from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.tokenizers.xar.generator import XARGenerator, check_space
from zoo.training.module import Losses, TrainingModule, batch_size

ROWS = 8
"""Classes of a picture."""


class FlowLoss(NamedTuple):
    """What a training pass gives."""

    loss: Tensor
    prediction: Tensor
    """(B, L, C) velocities."""
    noisy: Tensor
    """(B, L, C): what the network read."""


def drop_labels(labels: Tensor, no_class: int, share: float, uniform: Tensor | None = None) -> Tensor:
    """Labels (B,) of which a share becomes "no class": those whose draw from U[0, 1) is below it."""
    uniform = torch.rand(labels.shape, device=labels.device) if uniform is None else uniform
    return labels.where(uniform >= share, no_class)


def flow_loss(
    generator: XARGenerator, latents: Tensor, labels: Tensor, times: Tensor, noise: Tensor, clean_context: bool = False
) -> FlowLoss:
    """Mean squared error of all velocities, each entity noised at its own time (noisy-context learning).

    Args:
        latents: (B, C, g, g), scaled.
        labels: (B,), already dropped.
        times: (B, E) in (0, 1).
        noise: (B, L, C) standard normal, in the order of the sequence.
        clean_context: an entity is predicted after clean ones instead of noisy ones (teacher forcing, the paper's
            ablation). The sequence is then twice as long.
    """
    cut = generator.partition
    data = cut.to_sequence(latents)
    t = times[:, generator.entity]  # (B, L)
    noisy = interpolate(data, noise, t)
    prediction = generator(noisy, labels, times, data if clean_context else None)
    return FlowLoss((prediction - velocity(data, noise)).square().mean(), prediction, noisy)


class XARTraining(TrainingModule):
    """One optimizer, one loss; the tokenizer is frozen.

    Args:
        tokenizer: whose latents are generated.
        generator: what is trained.
        labels: batch -> (B,) int64 classes, see zoo.data.labels.
        tokenizer_weights: a file, where the tokenizer's name alone has none.
        generator_weights: a file to start from, for example the published one.
        clean_context: ablation, see flow_loss.
        others: of TrainingModule.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: XARGenerator,
        labels: Callable[[dict], Tensor],
        tokenizer_weights: str | Path | None = None,
        generator_weights: str | Path | None = None,
        clean_context: bool = False,
        **arguments,
    ):
        space = registry.tokenizers.with_weights(tokenizer, tokenizer_weights)
        check_space(generator, space)
        if generator_weights is not None:
            generator = registry.generators.with_weights(generator, generator_weights).train()
        super().__init__(space.requires_grad_(False), **arguments)
        self.generator, self.labels, self.clean_context = generator, labels, clean_context

    def optimized(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    def compiled(self) -> list[nn.Module]:
        return [self.generator]

    def train(self, mode: bool = True) -> XARTraining:
        super().train(mode)
        self.tokenizer.eval()
        return self

    def losses(self, batch: dict) -> Losses:
        loss = self.flow_loss(batch, self.shared_generator(self.device), drop=True)
        yield "generator", loss, {"loss": loss.detach()}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The loss without any dropout, at times and noise that are the same in every validation."""
        draws = torch.Generator(self.device).manual_seed(batch_idx)
        loss = self.flow_loss(batch, draws, drop=False)
        self.log_dict({"val/loss": loss}, batch_size=batch_size(batch), sync_dist=True, prog_bar=True)

    def flow_loss(self, batch: dict, draws: torch.Generator, drop: bool) -> Tensor:
        """What belongs to an image is drawn for the images of all ranks, so that their number does not matter."""
        generator, count = self.generator, batch_size(batch) * self.trainer.world_size
        drawn = {"device": self.device, "generator": draws}
        labels = self.labels(batch).to(self.device)
        if drop:
            uniform = self.own_rows(torch.rand(count, **drawn))
            labels = drop_labels(labels, generator.no_class, generator.config.label_dropout, uniform)
        view = self.own_rows(torch.rand(count, **drawn))
        latents = self.latents(batch, view, self.own_rows(torch.randn(count, *generator.info.shape, **drawn)))
        cut = generator.partition
        times = self.own_rows(logit_normal((count, len(cut.lengths)), **drawn))
        noise = self.own_rows(torch.randn(count, cut.length, generator.config.latent_dim, **drawn))
        return flow_loss(generator, latents, labels, times, noise, self.clean_context).loss

    @torch.no_grad()
    def latents(self, batch: dict, view: Tensor, noise: Tensor) -> Tensor:
        """(B, C, g, g) scaled latents: of a KL autoencoder drawn from the posterior with the noise (B, C, g, g).

        A batch with tokens that `zoo pretokenize` wrote is not encoded, nor one with moments; of their views (mirrored
        or not) each image takes the one at `view` (B,) in [0, 1).
        """
        space, shape = self.tokenizer, self.generator.info.shape[1:]
        if "tokens" in batch:
            return to_map(space.check_tokens(batch["tokens"]).latents["image"], shape)
        if "moments" in batch:
            views = batch["moments"].float()
            moments = views[torch.arange(len(views), device=self.device), (view * views.shape[1]).long()]
            return space.drawn(GaussianPosterior.from_moments(moments), noise)
        if isinstance(space, KLTokenizer):
            return space.scaled_latents(space.config.to_values(batch["image"]), True, noise)
        whole = {"num_tokens": space.info.max_tokens} if space.info.variable_length else {}
        return to_map(space.encode(batch["image"], **whole).latents["image"], shape)

    @torch.no_grad()
    def pictures(self, batch: dict, count: int) -> Tensor:
        """Samples, a row for each of the first classes."""
        labels = torch.arange(min(ROWS, self.generator.no_class), device=self.device).repeat_interleave(count)
        return self.tokenizer.decode(
            self.generator.generate(labels, generator=torch.Generator().manual_seed(self.seed))
        )

    def save(self, folder: Path) -> Path:
        path = folder / "generator.safetensors"
        registry.save(self.generator, path)
        return path
