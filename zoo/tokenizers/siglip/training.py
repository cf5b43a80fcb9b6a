"""Training of SigLIP (arXiv 2303.15343)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.errors import ZooError
from zoo.losses.contrastive import sigmoid_loss, sigmoid_loss_over_ranks
from zoo.metrics.retrieval import Retrieval
from zoo.tokenizer import Tokenizer
from zoo.tokenizers.siglip.encoder import SigLIPEncoder
from zoo.tokenizers.siglip.text import words
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
        others: of TrainingModule.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        encoder: SigLIPEncoder,
        encoder_weights: str | Path | None = None,
        mirror: bool = False,
        **arguments,
    ):
        super().__init__(tokenizer, **arguments)
        if encoder_weights is not None:
            encoder = registry.encoders.with_weights(encoder, encoder_weights).train()
        self.encoder, self.mirror, self.retrieval = encoder, mirror, Retrieval()

    def optimized(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def compiled(self) -> list[nn.Module]:
        return [self.encoder]

    def losses(self, batch: dict) -> Losses:
        images, captions = batch["image"], captions_of(batch)
        if self.mirror:
            count = len(images) * self.trainer.world_size
            draws = self.own_rows(torch.rand(count, generator=self.shared_generator()))
            images = mirrored(images, captions, draws)
        embeddings = self.encoder(images, self.encoder.text_ids(captions, truncate=True))
        scale, bias = self.encoder.logit_scale.exp(), self.encoder.logit_bias
        loss = sigmoid_loss_over_ranks(*embeddings, scale, bias)
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


def mirrored(images: Tensor, captions: list[str], draws: Tensor) -> Tensor:
    """Images (B, C, H, W), mirrored where the draw (B,) from U[0, 1) is below 0.5 and the caption names no side."""
    no_side = torch.tensor([SIDES.isdisjoint(words(caption)) for caption in captions])
    chosen = ((draws < 0.5) & no_side).to(images.device)
    return images.flip(-1).where(chosen[:, None, None, None], images)
