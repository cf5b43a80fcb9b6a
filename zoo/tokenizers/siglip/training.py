"""Training of SigLIP (arXiv 2303.15343)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.errors import ZooError
from zoo.losses.contrastive import sigmoid_loss, sigmoid_loss_over_ranks
from zoo.metrics.retrieval import Retrieval
from zoo.tokenizer import Tokenizer
from zoo.tokenizers.siglip.encoder import SigLIPEncoder
from zoo.tokenizers.siglip.text import contradict, words
from zoo.training.module import Losses, TrainingModule, batch_size

SIDES = {"left", "right"}
"""Words of a caption that is not true of the mirror image."""


class SigLIPTraining(TrainingModule):
    """One optimizer, the sigmoid loss over the pairs of all ranks; validation is retrieval among all its scenes.

    Args:
        tokenizer: None; an encoder is trained on images and captions alone.
        encoder: what is trained.
        encoder_weights: a file to start from, for example the published one.
        mirror: half of the images are mirrored where the caption names no side.
        alternatives: lists of words that exclude each other. Every caption is also read with one of its words replaced
            by another of the list, and belongs to no image then (NegCLIP's hard negatives, arXiv 2210.01936);
            without lists there are no such texts.
        others: of TrainingModule.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        encoder: SigLIPEncoder,
        encoder_weights: str | Path | None = None,
        mirror: bool = False,
        alternatives: Sequence[Sequence[str]] = (),
        **arguments,
    ):
        super().__init__(tokenizer, **arguments)
        if encoder_weights is not None:
            encoder = registry.encoders.with_weights(encoder, encoder_weights).train()
        self.encoder, self.mirror, self.retrieval = encoder, mirror, Retrieval()
        self.alternatives = [tuple(words) for words in alternatives]

    def optimized(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def compiled(self) -> list[nn.Module]:
        return [self.encoder]

    def losses(self, batch: dict) -> Losses:
        images, captions = batch["image"], captions_of(batch)
        draws = self.own_rows(torch.rand(len(images) * self.trainer.world_size, 4, generator=self.shared_generator()))
        if self.mirror:
            images = mirrored(images, captions, draws[:, 0])
        false = false_captions(captions, self.alternatives, draws[:, 1:]) if self.alternatives else []
        images, texts = self.encoder(images, self.encoder.text_ids(captions + false, truncate=True))
        scale, bias = self.encoder.logit_scale.exp(), self.encoder.logit_bias
        negatives = texts[len(captions) :] if false else None
        loss = sigmoid_loss_over_ranks(images, texts[: len(captions)], scale, bias, negatives)
        yield "encoder", loss, {"loss": loss.detach(), "scale": scale.detach(), "bias": bias.detach()}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The loss within each batch, since ranks may have unequal ones."""
        captions = captions_of(batch)
        images, texts = self.encoder(batch["image"], self.encoder.text_ids(captions, truncate=True))
        self.retrieval.update(images, texts, captions)
        loss = sigmoid_loss(images, texts, self.encoder.logit_scale.exp(), self.encoder.logit_bias)
        self.log("val/loss", loss, batch_size=batch_size(batch), sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Retrieval among the scenes of all batches and ranks."""
        self.log_dict({f"val/{name}": value for name, value in self.retrieval.compute().items()})
        self.retrieval.reset()

    def save(self, folder: Path) -> Path:
        path = folder / "encoder.safetensors"
        registry.save(self.encoder, path)
        return path


def captions_of(batch: dict) -> list[str]:
    """The field "caption". Raises ZooError when it was not asked for."""
    if "caption" not in batch:
        raise ZooError(f"the batch has no field 'caption', but {sorted(batch)}; add it to data.fields.")
    return batch["caption"]


def false_captions(captions: list[str], alternatives: Sequence[Sequence[str]], draws: Tensor) -> list[str]:
    """Each caption with one of its words replaced by another of its list, by draws (B, 3) from U[0, 1).

    Raises ZooError for a caption without any of the words.
    """
    false = [contradict(caption, alternatives, row) for caption, row in zip(captions, draws.tolist(), strict=True)]
    if None in false:
        raise ZooError(
            f"the caption '{captions[false.index(None)]}' has no word of module.alternatives; add one that each "
            "caption has, or leave the alternatives out."
        )
    return false


def mirrored(images: Tensor, captions: list[str], draws: Tensor) -> Tensor:
    """Images (B, C, H, W), mirrored where the draw (B,) from U[0, 1) is below 0.5 and the caption names no side."""
    no_side = torch.tensor([SIDES.isdisjoint(words(caption)) for caption in captions])
    chosen = ((draws < 0.5) & no_side).to(images.device)
    return images.flip(-1).where(chosen[:, None, None, None], images)
