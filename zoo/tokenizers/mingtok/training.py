"""Training of MingTok. The authors' recipe is not published: this one is the zoo's own, in the paper's three stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.precision import wide
from zoo.tokenizers.mingtok.losses import spread_mask
from zoo.tokenizers.mingtok.tokenizer import MingTokTokenizer
from zoo.training.autoencoder import AutoencoderTraining, Regularized
from zoo.training.teacher import Teacher

PARTS = ("encoder", "semantic_decoder", "pixel_decoder")


class Aids(nn.Module):
    """What learns beside the tokenizer and is left behind: the token of hidden patches, and a projector per teacher."""

    def __init__(self, tokenizer: MingTokTokenizer, teachers: nn.ModuleDict, masks: bool):
        super().__init__()
        c = tokenizer.config
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, c.encoder_width)) if masks else None
        widths = {"latent": c.latent_dim, "semantic": c.semantic_width}
        self.projectors = nn.ModuleDict({name: nn.Linear(widths[name], t.width) for name, t in teachers.items()})


class MingTokTraining(AutoencoderTraining):
    """Pixels of the whole and of a masked image, and two teachers: one for latents, one for semantic features.

    Args:
        trained: the parts of the tokenizer that learn in this stage, of "encoder", "semantic_decoder", "pixel_decoder".
        masked_weight: of the error of pixels from an image with patches hidden from the encoder; 0: no such pass.
        masked_every: that pass takes every n-th image of a batch.
        mask_ratio: share of the patches that are hidden.
        latent_teacher: whose features the latents of patches predict through a linear layer; usually self-supervised.
        semantic_teacher: whose features the semantic features predict through a linear layer; aligned with text.
        latent_weight, semantic_weight: of 1 - cosine of predicted and teacher's features, averaged over patches.
        others: of AutoencoderTraining. `loss: l1` on the whole image is the published "L1-plain".

    Raises:
        ZooError: unknown parts, or a teacher whose number of features is not that of the tokenizer's latents.
    """

    def __init__(
        self,
        tokenizer: MingTokTokenizer,
        trained: Sequence[str] = PARTS,
        masked_weight: float = 1.0,
        masked_every: int = 1,
        mask_ratio: float = 0.5,
        latent_teacher: Teacher | None = None,
        semantic_teacher: Teacher | None = None,
        latent_weight: float = 1.0,
        semantic_weight: float = 1.0,
        **arguments,
    ):
        super().__init__(tokenizer, **arguments)
        if not trained or not set(trained) <= set(PARTS):
            raise ZooError(f"trained must be some of {', '.join(PARTS)}, got {list(trained)}.")
        if not 0 < mask_ratio < 1:
            raise ZooError(f"mask_ratio must be between 0 and 1, got {mask_ratio}.")
        if masked_every < 1:
            raise ZooError(f"masked_every must be at least 1, got {masked_every}.")
        for part in PARTS:
            getattr(tokenizer, part).requires_grad_(part in trained)
        given = {"latent": latent_teacher, "semantic": semantic_teacher}
        self.teachers = nn.ModuleDict({name: teacher for name, teacher in given.items() if teacher is not None})
        for name, teacher in self.teachers.items():
            if teacher.num_features != tokenizer.info.max_tokens:
                raise ZooError(
                    f"{name}_teacher={teacher.name} has {teacher.num_features} features of an image, and "
                    f"{tokenizer.info.name} has {tokenizer.info.max_tokens} latents; choose one whose grid is the same."
                )
        self.aids = Aids(tokenizer, self.teachers, masks=masked_weight > 0)
        self.masked_weight, self.masked_every, self.mask_ratio = masked_weight, masked_every, mask_ratio
        self.weights = {"latent": latent_weight, "semantic": semantic_weight}

    def optimized(self) -> dict[str, nn.Module]:
        modules = super().optimized()
        return modules | {"tokenizer": nn.ModuleList([modules["tokenizer"], self.aids])}

    def values(self, images: Tensor) -> Tensor:
        return self.tokenizer.to_values(images)

    @property
    def last_layer(self) -> Tensor:
        return self.tokenizer.pixel_decoder.head.weight

    def regularized(self, values: Tensor) -> Regularized:
        latents, features = self.understand(values)
        reconstruction = self.tokenizer.pixel_decoder(features)
        terms = {}
        if self.masked_weight:
            mask = self.random_mask(len(values), self.shared_generator(self.device))
            some, share = self.masked_images(len(values))
            masked = self.loss(self.complete(values[some], mask[some]), values[some])
            terms["masked"] = self.masked_weight * share * masked
        for name, distance in self.distances(values, latents, features).items():
            terms[name] = self.weights[name] * distance
        return Regularized(reconstruction, sum(terms.values(), values.new_zeros(())), codes=None, logs=terms)

    def understand(self, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values (B, 3, H, W) to latents (B, N, C), not normalised, and semantic features (B, N, D)."""
        latents = self.tokenizer.encoder(values, mask, None if mask is None else self.aids.mask_token)[:, :-1]
        return latents, self.tokenizer.semantic_decoder(latents)

    def complete(self, values: Tensor, mask: Tensor) -> Tensor:
        """Values (B, 3, H, W) of which the patches at mask (B, N) are hidden to reconstructed values."""
        return self.tokenizer.pixel_decoder(self.understand(values, mask)[1])

    def distances(self, values: Tensor, latents: Tensor, features: Tensor) -> dict[str, Tensor]:
        """1 - cosine to the features of each teacher, averaged over patches."""
        predicted = {"latent": latents, "semantic": features}
        images, found = (values + 1) / 2, {}
        for name, teacher in self.teachers.items():
            projected = self.aids.projectors[name](predicted[name])
            found[name] = (1 - F.cosine_similarity(wide(projected), wide(teacher(images)), dim=-1)).mean()
        return found

    def masked_images(self, batch: int) -> tuple[slice, float]:
        """Those of this rank's images that are masked, which are every masked_every-th of all ranks', and what their
        mean loss counts, so that the average over ranks is that over images; 0 for one image where there is none."""
        ranks, every = self.trainer.world_size, self.masked_every
        first = -self.global_rank * batch % every
        count = len(range(first, batch, every))
        return (slice(first, None, every) if count else slice(1)), count * ranks / len(range(0, batch * ranks, every))

    def random_mask(self, batch: int, draws: torch.Generator) -> Tensor:
        """(B, N) bool with the same number of hidden patches in each row, drawn for the images of all ranks."""
        count = self.tokenizer.info.max_tokens
        drawn = torch.rand(batch * self.trainer.world_size, count, device=self.device, generator=draws)
        return self.own_rows(drawn).argsort(1).argsort(1) < round(self.mask_ratio * count)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        values = self.values(batch["image"])
        latents, features = self.understand(values)
        scores = {f"val/{name}": distance for name, distance in self.distances(values, latents, features).items()}
        scores |= {"val/latent_mean": latents.mean(), "val/latent_square": latents.square().mean()}
        self.log_dict(scores, batch_size=len(values), sync_dist=True)

    def save(self, folder: Path) -> Path:
        """The tokenizer with the mean and the standard deviation of the latents of the last validation."""
        measured = self.trainer.callback_metrics
        if "val/latent_mean" in measured:
            mean, square = (float(measured[f"val/latent_{name}"]) for name in ("mean", "square"))
            scale = (square - mean**2) ** 0.5
            self.tokenizer.config = replace(self.tokenizer.config, latent_mean=mean, latent_scale=scale)
        return super().save(folder)

    @torch.no_grad()
    def pictures(self, batch: dict, count: int) -> Tensor:
        """Also of each image what the encoder saw of it when patches were hidden, and what came of that."""
        if not self.masked_weight:
            return super().pictures(batch, count)
        images = batch["image"][:count]
        mask = self.random_mask(len(images), torch.Generator(self.device).manual_seed(self.seed))
        completed = self.tokenizer.to_images(self.complete(self.values(images), mask))
        pixels = spread_mask(mask, images.shape[-2] * images.shape[-1]).view(len(images), 1, *images.shape[-2:])
        return torch.cat([super().pictures(batch, count), images.where(~pixels, 0.5), completed])
