"""SigLIP (arXiv 2303.15343): an image and a text encoder whose embeddings meet where a text describes an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.tokenizer import ImageReader, Preset, Weights
from zoo.tokenizers.siglip.text import PAD, UNKNOWN, HubTokenizer, WordTokenizer


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of the two towers; the defaults are the published siglip-base-patch16-224."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    """Of the vision tower, and of the embeddings of images and texts."""
    depth: int = 12
    num_heads: int = 12
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    mlp_ratio: float = 4.0
    text_length: int = 64
    """Tokens of a text; shorter ones are padded."""
    vocab_size: int = 32_000
    text_tokenizer: str = "google/siglip-base-patch16-224"
    """Hub id or local folder of transformers' tokenizer; not read where there is a vocabulary."""
    vocabulary: tuple[str, ...] = ()
    """Words and punctuation marks, after <pad> and <unk>, of a tokenizer that needs no file."""

    def __post_init__(self):
        for tower, width, heads in (("", self.width, self.num_heads), ("text_", self.text_width, self.text_heads)):
            if heads < 1 or width < 1 or width % heads:
                raise ZooError(f"SigLIPConfig.{tower}width {width} must be a multiple of the number of heads {heads}.")
        if not 1 <= self.patch_size <= self.image_size:
            raise ZooError(f"SigLIPConfig.patch_size {self.patch_size} must be from 1 to image_size {self.image_size}.")
        if min(self.depth, self.text_depth, self.text_length, self.vocab_size) < 1 or self.mlp_ratio <= 0:
            raise ZooError("SigLIPConfig.depth, text_depth, text_length, vocab_size and mlp_ratio must be above 0.")
        if self.vocabulary and self.vocabulary[:2] != (PAD, UNKNOWN):
            raise ZooError(f"SigLIPConfig.vocabulary must begin with {PAD} and {UNKNOWN}, got {self.vocabulary[:2]}.")
        if self.vocabulary and len(self.vocabulary) != self.vocab_size:
            raise ZooError(
                f"SigLIPConfig.vocab_size is {self.vocab_size}, and its vocabulary has {len(self.vocabulary)} words."
            )

    @property
    def num_patches(self) -> int:
        """Pixels beyond the last whole patch of a row or column are not read."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class EncoderInfo:
    """What a caller has to know about an encoder before using it."""

    system: str
    paper: str
    image_size: int
    """Side in pixels of the square images it takes."""
    channels: int
    num_features: int
    """Patches of an image."""
    embed_dim: int
    """Width of features and of embeddings of images and texts."""
    depth: int
    """Layers whose outputs `features` gives."""
    text_length: int
    """Tokens that a text may have."""
    name: str = "custom"
    licence: str = "Apache-2.0"

    size_multiple = None  # no other size is taken
    input = "image"


class SigLIPEncoder(ImageReader):
    """Embeds images (B, 3, H, W) in [0, 1] and texts into one space, and gives features of every layer.

    `encode_image`, `encode_text`, `features` and `similarity` are the public, checked and gradient-free side; training
    goes through forward, and systems that tap or replace features through the towers. `features(images)` are those of
    the last layer after the post norm, `features(images, layer=i)` those of layer i as they are, 0 the patches.
    """

    Config = SigLIPConfig

    def __init__(self, config: SigLIPConfig):
        from zoo.tokenizers.siglip.towers import TextTower, VisionTower  # timm takes seconds to import

        super().__init__(config)
        c = config
        self.vision, self.text = VisionTower(c), TextTower(c)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))
        self.info = EncoderInfo(
            system="siglip",
            paper="arXiv:2303.15343",
            image_size=c.image_size,
            channels=3,
            num_features=c.num_patches,
            embed_dim=c.width,
            depth=c.depth,
            text_length=c.text_length,
        )

    @cached_property
    def text_tokenizer(self) -> WordTokenizer | HubTokenizer:
        """list[str] to ids (B, text_length). Raises ZooError when it is a file that is not on the machine."""
        c = self.config
        if c.vocabulary:
            return WordTokenizer(c.vocabulary, c.text_length)
        return HubTokenizer(c.text_tokenizer, c.text_length)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] and ids (B', text_length) to embeddings (B, D) and (B', D), L2-normalised."""
        return F.normalize(self.vision(to_values(images)), dim=-1), F.normalize(self.text(ids), dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Embeddings (B, D) and (K, D) to logits (B, K), whose sigmoid is the chance that text and image are a pair."""
        return self.logit_scale.exp() * images @ texts.T + self.logit_bias

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.vision(to_values(images))

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.text(self.text_ids(texts))

    def _features(self, images: Tensor, layer: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to patch features (B, N, D).

        layer: None for the last layer's after the post norm, which are what is pooled; 0..depth for the output of that
        layer as it is, 0 being the embedded patches. Raises ZooError for other layers.
        """
        tower, depth = self.vision, self.config.depth
        if layer is not None and not (type(layer) is int and 0 <= layer <= depth):
            raise ZooError(f"{self.info.name} has features of layers 0..{depth}, or of None, got {layer!r}.")
        h = tower.layers(tower.embed(to_values(images)), stop=layer)
        return tower.norm(h) if layer is None else h

    def text_ids(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        """Texts to ids (B, text_length) int64 on the encoder's device; ZooError when they are not what it takes.

        truncate: a text that is too long loses its end instead, as the captions of training do.
        """
        return self.text_tokenizer(self.check_texts(texts), truncate).to(self.device)


def to_values(images: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]: mean and standard deviation are 0.5."""
    return 2 * images - 1


SCENE_WORDS = (
    "<pad> <unk> , . : a all an and are beige blue brown cone cones cube cubes cyan cylinder cylinders dark eight "
    "far five floor four from front glossy gray green image in is large lavender left light matte metal near object "
    "objects of on one orange pale picture pink purple red rendering right ring rings room scene seven six small "
    "sphere spheres stand stands there three to two walls white with yellow"
)
"""The words of the captions of the embedded scenes."""

SO400M = SigLIPConfig(
    width=1152,
    depth=27,
    num_heads=16,
    text_width=1152,
    text_depth=27,
    text_heads=16,
    mlp_ratio=3.7362,
    vocab_size=256_000,
)
PRESETS = {
    "siglip-base-patch16-224": Preset(
        SigLIPEncoder,
        SigLIPConfig(),
        "published SigLIP ViT-B/16: 224 x 224 images, English text",
        Weights("hf://google/siglip-base-patch16-224/model.safetensors"),
    ),
    **{
        (name := f"siglip2-so400m-patch{patch}-{size}"): Preset(
            SigLIPEncoder,
            replace(SO400M, image_size=size, patch_size=patch, text_tokenizer=f"google/{name}"),
            f"published SigLIP 2 (arXiv 2502.14786) So400m/{patch}: {size} x {size} images, text in many languages",
            Weights(f"hf://google/{name}/model.safetensors"),
        )
        for patch, size in ((16, 256), (14, 384))
    },
    "siglip-tiny": Preset(
        SigLIPEncoder,
        SigLIPConfig(
            image_size=64,
            patch_size=8,
            width=128,
            depth=4,
            num_heads=4,
            text_width=128,
            text_depth=3,
            text_heads=4,
            text_length=66,
            vocab_size=73,
            text_tokenizer="",
            vocabulary=tuple(SCENE_WORDS.split()),
        ),
        "small SigLIP trained on the embedded scenes and their captions: 64 x 64 images",
        Weights("siglip-tiny.safetensors", "ee75107b4ea4a40c9aed1ba7015b385376a29833c4a01cd5dd7eb9d6af74abb2"),
    ),
}
