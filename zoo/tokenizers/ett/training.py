"""End-to-end tuning of a tokenizer by captions (arXiv 2505.10562, section 3.3). Its code was never released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.lm.embeddings import EmbeddingConfig
from zoo.lm.training import VisualLMTraining
from zoo.registry import save_tokenizer
from zoo.tokenizer import Tokenizer
from zoo.training.autoencoder import AutoencoderTraining
from zoo.training.module import Losses, TrainingModule, batch_size


class ETTTraining(VisualLMTraining):
    """The second of the three stages: language model, projector and tokenizer learn together (equation 1).

    The loss is that of the captions, the mean over their words, plus alpha times the whole loss of the tokenizer's own
    recipe; a discriminator, if that has one, goes on learning. The vectors that the quantizer gives in the pass of that
    recipe are what the language model reads, so that captions move encoder and codebook as far as the quantizer passes
    gradients. The stages before and after it, with a frozen tokenizer, are VisualLMTraining.

    Args:
        tokenizer: a discrete one.
        autoencoder: its own recipe, as a function of the tokenizer: an AutoencoderTraining whose optimizers are left
            out.
        embeddings: see there.
        alpha: 0.25 as published. 0: captions alone, which ruin the pixels.
        others: of VisualLMTraining.

    Raises:
        ZooError: a negative alpha, images to be learned, or a recipe of another kind.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        autoencoder: Callable[..., AutoencoderTraining],
        embeddings: EmbeddingConfig,
        alpha: float = 0.25,
        image_share: float = 0.0,
        **arguments,
    ):
        if alpha < 0:
            raise ZooError(f"alpha must be at least 0, got {alpha}.")
        if image_share:
            raise ZooError(f"codes are no targets while they move: image_share must be 0, got {image_share}.")
        super().__init__(tokenizer, embeddings=embeddings, image_share=image_share, **arguments)
        self.alpha = alpha
        self.tokenizer.requires_grad_(True)
        self.autoencoder = autoencoder(self.tokenizer, optimizers={})
        if not isinstance(self.autoencoder, AutoencoderTraining):
            raise ZooError(f"autoencoder must be an AutoencoderTraining, got {type(self.autoencoder).__name__}.")
        self.train()  # Lightning leaves modes as they are

    def optimized(self) -> dict[str, nn.Module]:
        modules = self.autoencoder.optimized() if self.alpha else {}
        return super().optimized() | {name: module for name, module in modules.items() if name != "tokenizer"}

    def train(self, mode: bool = True) -> ETTTraining:
        super().train(mode)
        self.tokenizer.train(mode)
        if hasattr(self, "autoencoder"):
            self.autoencoder.train(mode)
        return self

    def losses(self, batch: dict) -> Losses:
        values = self.autoencoder.values(batch[self.tokenizer.info.input])
        made = self.autoencoder.regularized(values)
        steps = self.autoencoder.steps(values, made) if self.alpha else [("tokenizer", values.new_zeros(()), {})]
        for name, loss, logs in steps:
            if name == "tokenizer":
                caption, found = self.caption_loss(batch, made.codes)
                found["loss"] = found["loss"] + self.alpha * loss.detach()
                logs = {f"tokenizer/{key}": value for key, value in logs.items()} | found
                name, loss = "model", caption + self.alpha * loss
            yield name, loss, logs

    def caption_loss(self, batch: dict, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the captions behind codebook embeddings (B, N, D), which get a gradient, and what to log."""
        never = torch.zeros(batch_size(batch), dtype=torch.bool)
        seen = self.model.vision.seen(codes)
        return self.weighted(*self.pair_losses(batch, never, never, torch.Generator(self.device), seen=seen))

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        TrainingModule.validation_step(self, batch, batch_idx)

    def pictures(self, batch: dict, count: int) -> Tensor:
        return TrainingModule.pictures(self, batch, count)

    def save(self, folder: Path) -> Path:
        """The tuned tokenizer, by the name of the one that it was, and the folder `model` of all for VisualLM.load."""
        save_tokenizer(self.tokenizer, folder / "tokenizer.safetensors")
        return super().save(folder)
