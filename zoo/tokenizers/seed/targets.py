"""What the codes of SEED learn to tell: embeddings that frozen networks make of an image, or of its caption.

Each is called with images (B, 3, S, S) in [0, 1] and their captions, and has `shape`, that of an embedding without the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.hub import pretrained
from zoo.tokenizers.seed.tokenizer import MEAN, STD
from zoo.tokenizers.siglip.encoder import SigLIPEncoder, to_values


class Target(nn.Module):
    """Base of the targets: frozen, and always in evaluation mode."""

    shape: tuple[int, ...]
    reads: str = "image"
    """Field of a batch that it reads beside or instead of the image."""

    def train(self, mode: bool = True) -> Target:
        return super().train(False)


class ImageEmbedding(Target):
    """The embedding (B, D) that an encoder of the zoo gives an image, not normalised."""

    def __init__(self, encoder: SigLIPEncoder):
        super().__init__()
        self.tower = encoder.vision.requires_grad_(False)
        self.shape = (encoder.info.embed_dim,)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        return self.tower(to_values(images))


class TextFeatures(Target):
    """The features (B, L, D) of all words of a caption, of the text side of an encoder of the zoo."""

    reads = "caption"

    def __init__(self, encoder: SigLIPEncoder):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.shape = (encoder.config.text_length, encoder.config.text_width)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.encoder.text.features(self.encoder.text_ids(captions, truncate=True))


class CLIPImageEmbedding(Target):
    """`image_embeds` (B, D) of a CLIP of transformers, projected and not normalised: what unCLIP decodes.

    name: hub id or folder; that of Stable unCLIP 2.1 is CLIP ViT-H/14. Half precision on a GPU, as published.
    Raises ZooError when it cannot be had.
    """

    def __init__(self, name: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        self.model = pretrained(CLIPVisionModelWithProjection, name).requires_grad_(False)
        self.shape = (self.model.config.projection_dim,)
        for key, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        with torch.autocast(images.device.type, torch.float16, enabled=images.device.type == "cuda"):
            return self.model((images - self.mean) / self.std).image_embeds.float()


class CLIPTextFeatures(Target):
    """`last_hidden_state` (B, L, D) of a CLIP text encoder of transformers, padded to its length: what Stable
    Diffusion 1 reads (SEED-1).

    name: hub id or folder, the default being the encoder of Stable Diffusion 1. Raises ZooError when it cannot be had.
    """

    reads = "caption"

    def __init__(self, name: str | Path = "openai/clip-vit-large-patch14"):
        super().__init__()
        from transformers import AutoTokenizer, CLIPTextModel

        self.model = pretrained(CLIPTextModel, name).requires_grad_(False)
        self.words = pretrained(AutoTokenizer, name)
        sizes = self.model.config
        self.shape = (sizes.max_position_embeddings, sizes.hidden_size)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        ids = self.words(
            list(captions), padding="max_length", truncation=True, max_length=self.shape[0], return_tensors="pt"
        )["input_ids"]
        return self.model(ids.to(images.device)).last_hidden_state
