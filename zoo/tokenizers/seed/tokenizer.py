"""SEED (arXiv 2307.08041, 2310.01218): an image as a short causal sequence of ids, and these as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.quantizers import EMAQuantizer, Quantized, VectorQuantizer, codebook_quantizer
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights
from zoo.tokenizers.seed.qformer import QFormer, QFormerConfig
from zoo.tokenizers.siglip.encoder import SCENE_WORDS
from zoo.tokenizers.siglip.text import BEGIN, PAD, HubTokenizer, WordTokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, by channel."""


@dataclass(frozen=True)
class EVAConfig:
    """Sizes of the image tower; the defaults are EVA-CLIP ViT-g/14 without its last block."""

    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    num_heads: int = 16
    mlp_ratio: float = 4.3637
    class_token: bool = True

    def __post_init__(self):
        if min(self.patch_size, self.width, self.depth) < 1 or self.mlp_ratio <= 0:
            raise ZooError("EVAConfig.patch_size, width, depth and mlp_ratio must be above 0.")
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ZooError(f"EVAConfig.width {self.width} must be a multiple of num_heads {self.num_heads}.")

    def num_tokens(self, image_size: int) -> int:
        """Patches of an image, and the class token."""
        return (image_size // self.patch_size) ** 2 + self.class_token


@dataclass(frozen=True)
class HeadConfig:
    """What makes the embedding of an image of its decoded queries."""

    kind: str = "mlp"
    """"mlp" (as in the released weights) or "qformer" (the Reverse Q-Former of the published training code)."""
    dim: int = 1024
    """Width of the embedding."""
    widths: tuple[int, ...] = (256, 128, 32)
    """Of the linear layers that every query goes through; "mlp"."""
    num_queries: int = 1
    """Vectors of the embedding: 1, or those of a text (SEED-1); "qformer"."""
    depth: int = 4
    """Layers; "qformer"."""

    def __post_init__(self):
        if self.kind not in ("mlp", "qformer"):
            raise ZooError(f"HeadConfig.kind must be 'mlp' or 'qformer', got {self.kind!r}.")
        if not self.widths or min(self.dim, self.num_queries, self.depth, *self.widths) < 1:
            raise ZooError("HeadConfig.dim, widths, num_queries and depth must be at least 1.")
        if self.kind == "mlp" and self.num_queries != 1:
            raise ZooError("a head of kind 'mlp' makes one vector; for more choose kind 'qformer'.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an embedding, without the batch."""
        return (self.dim,) if self.num_queries == 1 else (self.num_queries, self.dim)


@dataclass(frozen=True)
class SeedConfig:
    """Sizes of SEED; the defaults are the published seed-tokenizer-2."""

    image_size: int = 224
    encoder: EVAConfig = EVAConfig()
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    codebook_size: int = 8192
    embed_dim: int = 32
    """Width of the codes."""
    commitment: float = 1.0
    codebook_weight: float = 0.25
    """As published, whose quantizer weighs the two terms the other way round than VQ-VAE does."""
    ema_decay: float = 0.0
    """Above 0: codes are running means instead of learned by gradient."""
    restart_below: float = 0.0
    """Codes counted below this are drawn anew from data; with ema_decay."""
    decoder_depth: int = 4
    """Blocks of each of the two branches behind the codes."""
    decoder_heads: int = 12
    retrieval: bool = True
    """Whether there is the branch that gives queries back, from which texts are found; decoding does not need it."""
    head: HeadConfig = field(default_factory=HeadConfig)
    text_dim: int = 256
    """Width of the space of images and texts; where qformer.vocab_size says that there is a text side."""
    text_length: int = 32
    """Tokens of a text; shorter ones are padded."""
    text_tokenizer: str = "google-bert/bert-base-uncased"
    """Hub id or local folder of transformers' tokenizer; not read where there is a vocabulary."""
    vocabulary: tuple[str, ...] = ()
    """Words and punctuation marks, after those for padding, unknown and beginning, of a tokenizer without a file."""
    decoder: str = ""
    """What makes pixels of embeddings: a name of `zoo list`, the folder or hub id of a pipeline of diffusers (unCLIP;
    for a sequence of vectors Stable Diffusion), or a file of a decoder trained here. Without one `decode` gives
    embeddings."""

    def __post_init__(self):
        width, heads = self.qformer.width, self.decoder_heads
        if heads < 1 or width % heads:
            raise ZooError(f"SeedConfig.qformer.width {width} must be a multiple of decoder_heads {heads}.")
        if min(self.codebook_size, self.embed_dim, self.decoder_depth, self.text_dim) < 1:
            raise ZooError("SeedConfig.codebook_size, embed_dim, decoder_depth and text_dim must be at least 1.")
        if not self.encoder.patch_size <= self.image_size:
            raise ZooError(
                f"SeedConfig.image_size {self.image_size} is below encoder.patch_size {self.encoder.patch_size}."
            )
        if not 1 <= self.text_length <= self.qformer.max_positions:
            raise ZooError(
                f"SeedConfig.text_length {self.text_length} must be from 1 to qformer.max_positions "
                f"{self.qformer.max_positions}."
            )
        if self.vocabulary and self.vocabulary[:3] != TEXT_MARKS:
            raise ZooError(f"SeedConfig.vocabulary must begin with {' '.join(TEXT_MARKS)}, got {self.vocabulary[:3]}.")
        if self.qformer.vocab_size and self.vocabulary and len(self.vocabulary) != self.qformer.vocab_size:
            raise ZooError(
                f"SeedConfig.qformer.vocab_size is {self.qformer.vocab_size}, and the vocabulary has "
                f"{len(self.vocabulary)} words."
            )


TEXT_MARKS = (PAD, "<unk>", BEGIN)


class SeedOutput(NamedTuple):
    """What a forward pass of the second stage gives."""

    queries: Tensor
    """(B, N, W): output of the Q-Former."""
    quantized: Quantized
    """Of their codes."""
    decoded: Tensor
    """(B, N, W): what both branches read."""
    reconstruction: Tensor | None
    """(B, N, W): the queries, back from the codes; None without that branch."""
    embedding: Tensor
    """(B, E) or (B, T, E)."""


class MLPHead(nn.Module):
    """Each query to a few numbers, and all of these together to one vector."""

    def __init__(self, c: HeadConfig, width: int, num_queries: int):
        super().__init__()
        layers = []
        for inner, outer in zip((width, *c.widths), c.widths, strict=False):
            layers += [nn.Linear(inner, outer, bias=False), nn.ReLU()]
        self.down = nn.Sequential(*layers[:-1])
        self.proj = nn.Linear(num_queries * c.widths[-1], c.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) to (B, E)."""
        return self.proj(self.down(x).flatten(1))


class QFormerHead(nn.Module):
    """Learned queries that read the decoded ones: the Reverse Q-Former."""

    def __init__(self, c: HeadConfig, qformer: QFormerConfig):
        super().__init__()
        sizes = replace(qformer, num_queries=c.num_queries, depth=c.depth, cross_every=2, vocab_size=0)
        self.queries = nn.Parameter(torch.empty(1, c.num_queries, qformer.width).normal_(std=0.02))
        self.qformer = QFormer(sizes, qformer.width)
        self.proj = nn.Linear(qformer.width, c.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) to (B, E) or (B, T, E)."""
        out = self.proj(self.qformer(self.queries, x))
        return out[:, 0] if out.shape[1] == 1 else out


class SeedTokenizer(Tokenizer):
    """Maps images (B, 3, S, S) to N ids in a causal order, and ids to an embedding of the image, and that to pixels
    where a decoder is attached (`config.decoder`, or `attach`).

    With a text side, that of the first stage of training, images and their ids are found by texts, too.
    """

    Config = SeedConfig
    image_dtype = torch.float32  # until they are normalised: rounded before that, one id in 60 is another in bfloat16

    def __init__(self, config: SeedConfig):
        from timm.models.vision_transformer import Block  # timm takes seconds to import

        from zoo.tokenizers.seed.vision import EVATower

        super().__init__(config)
        c, width = config, config.qformer.width
        self.encoder = EVATower(c.image_size, c.encoder)
        self.encoder_norm = nn.LayerNorm(c.encoder.width)
        self.query_tokens = nn.Parameter(torch.empty(1, c.qformer.num_queries, width).normal_(std=0.02))
        self.qformer = QFormer(c.qformer, c.encoder.width)
        self.encode_task = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, c.embed_dim))
        self.quantizer: VectorQuantizer | EMAQuantizer = codebook_quantizer(
            c.codebook_size, c.embed_dim, c.commitment, c.codebook_weight, c.ema_decay, c.restart_below
        )
        self.decode_task = nn.Sequential(nn.Linear(c.embed_dim, c.embed_dim), nn.Tanh(), nn.Linear(c.embed_dim, width))

        def branch() -> tuple[nn.Parameter, nn.Sequential]:
            blocks = (Block(width, c.decoder_heads, qkv_bias=True) for _ in range(c.decoder_depth))
            return nn.Parameter(torch.zeros(1, c.qformer.num_queries, width)), nn.Sequential(*blocks)

        if c.retrieval:
            self.pos_embed, self.blocks = branch()
        self.pos_embed_image, self.blocks_image = branch()
        self.head = (
            MLPHead(c.head, width, c.qformer.num_queries) if c.head.kind == "mlp" else QFormerHead(c.head, c.qformer)
        )
        if c.qformer.vocab_size:
            self.image_proj, self.text_proj = nn.Linear(width, c.text_dim), nn.Linear(width, c.text_dim)
            self.temperature = nn.Parameter(torch.tensor(0.07))
        self._attached: list[Any] = []  # in a list, so that its parameters are not the tokenizer's
        self.info = TokenizerInfo(
            system="seed",
            paper="arXiv:2310.01218",
            image_size=c.image_size,
            size_multiple=None,
            channels=3,
            kind="discrete",
            streams=("image",),
            codebook_sizes={"image": c.codebook_size},
            embedding_dim=c.embed_dim,
            max_tokens=c.qformer.num_queries,
            decodes_to="pixels" if c.decoder else "embedding",
        )

    # The parts of a pass, in their order; training composes them, too.

    def to_values(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1], normalised as CLIP's, in the dtype of the weights."""
        channels = zip(images.unbind(1), MEAN, STD, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1).to(self.dtype)

    def read(self, values: Tensor) -> Tensor:
        """Values (B, 3, S, S) to what the queries read (B, M, C)."""
        return self.encoder_norm(self.encoder(values))

    def query(self, values: Tensor) -> Tensor:
        """Values (B, 3, S, S) to the causal embeddings (B, N, W): output of the Q-Former."""
        return self.qformer(self.query_tokens, self.read(values))

    def decoded(self, codes: Tensor) -> Tensor:
        """Codes (B, N, D) to what both branches read (B, N, W)."""
        return self.decode_task(codes)

    def reconstructed(self, decoded: Tensor) -> Tensor:
        """(B, N, W), see decoded, to the queries that the codes stand for (B, N, W)."""
        return self.blocks(decoded + self.pos_embed)

    def to_embedding(self, decoded: Tensor) -> Tensor:
        """(B, N, W), see decoded, to the embedding of the image (B, E) or (B, T, E), not normalised."""
        return self.head(self.blocks_image(decoded + self.pos_embed_image))

    def to_text_space(self, queries: Tensor) -> Tensor:
        """Queries (B, N, W), read or reconstructed, to (B, text_dim): the last one has seen all others."""
        return self.image_proj(queries[:, -1])

    def embed_ids(self, ids: Tensor, live: Tensor) -> Tensor:
        """Words (B, L) of texts and which of them are no padding, to (B, text_dim)."""
        return self.text_proj(self.qformer(ids=ids, live=live)[:, 0])

    def forward(self, queries: Tensor) -> SeedOutput:
        """The second stage, for queries (B, N, W) of an image; in training mode running means of codes move."""
        quantized = self.quantizer(self.encode_task(queries))
        decoded = self.decoded(quantized.quantized)
        reconstruction = self.reconstructed(decoded) if self.config.retrieval else None
        return SeedOutput(queries, quantized, decoded, reconstruction, self.to_embedding(decoded))

    # Texts.

    @cached_property
    def text_tokenizer(self) -> WordTokenizer | HubTokenizer:
        """list[str] to ids (B, text_length). Raises ZooError when it is a file that is not on the machine."""
        c = self.config
        if c.vocabulary:
            return WordTokenizer(c.vocabulary, c.text_length)
        return HubTokenizer(c.text_tokenizer, c.text_length)

    def text_ids(self, texts: Sequence[str], truncate: bool = False) -> tuple[Tensor, Tensor]:
        """Texts to ids (B, text_length) int64 and which of them are no padding, on the tokenizer's device.

        truncate: a text that is too long loses its end instead of being refused, as the captions of training do.
        Raises ZooError for texts that it does not take, or without a text side.
        """
        if not self.config.qformer.vocab_size:
            super()._encode_text(texts)
        ids = self.text_tokenizer(self.check_texts(texts), truncate)
        live = ids != self.text_tokenizer.pad
        return ids.to(self.device), live.to(self.device)

    # The contract.

    def _encode(self, images: Tensor) -> Tokens:
        queries = self.query(self.to_values(images))
        return Tokens({"image": self.quantizer.encode(self.encode_task(queries))})

    def _decode(self, tokens: Tokens, negative: Tokens | None = None, **settings) -> Tensor:
        """Images (B, 3, H, W) of the decoder, or without one embeddings (B, E) or (B, T, E).

        negative: ids to lead away from, of one image or of B; settings: of the decoder.
        """
        embedding, decoder = self.decode_embedding(tokens), self.decoder
        if decoder is None:
            if negative is not None or settings:
                given = ", ".join([*(["negative"] if negative is not None else []), *settings])
                raise ZooError(f"{self.info.name} decodes to embeddings, which has no settings, got {given}.")
            return embedding
        if negative is not None:
            settings["negative"] = self.decode_embedding(negative)
        return decoder.to(self.device).decode(embedding, **settings)

    def _features(self, images: Tensor, quantized: bool = True) -> Tensor:
        """(B, N, W): queries as their ids tell them; quantized=False: as the Q-Former gives them."""
        queries = self.query(self.to_values(images))
        return self._from_codes(self.quantizer.encode(self.encode_task(queries))) if quantized else queries

    def _encode_image(self, images: Tensor, quantized: bool = True) -> Tensor:
        """quantized: as `_features` has it."""
        if not self.config.qformer.vocab_size:
            return super()._encode_image(images)
        return self.to_text_space(self._features(images, quantized))

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.embed_ids(*self.text_ids(texts))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        return images @ texts.T / self.temperature

    @torch.no_grad()
    def decode_embedding(self, tokens: Tokens) -> Tensor:
        """The embedding (B, E) or (B, T, E) that the ids stand for, not normalised: an estimate of what the image tower
        of CLIP makes of the image (of its text encoder's features of a caption, SEED-1).

        Raises ZooError for tokens that are not this tokenizer's.
        """
        ids = self.check_tokens(tokens).ids["image"]
        return self.to_embedding(self.decoded(self.quantizer.codes(ids).to(self.dtype)))

    @torch.no_grad()
    def features_of(self, tokens: Tokens) -> Tensor:
        """`features` (B, N, W) of an image from its ids. Raises ZooError for tokens that are not this tokenizer's."""
        return self._from_codes(self.check_tokens(tokens).ids["image"])

    @torch.no_grad()
    def embedding_of(self, tokens: Tokens) -> Tensor:
        """`encode_image` (B, text_dim) of an image from its ids, L2-normalised. Raises ZooError as features_of does."""
        return F.normalize(self.to_text_space(self.features_of(tokens)), dim=-1)

    def check_tokens(self, tokens: Tokens, streams: Sequence[str] | None = None) -> Tokens:
        tokens = super().check_tokens(tokens, streams)
        ids, count = tokens.ids["image"], self.info.max_tokens
        if ids.shape[1] != count:
            raise ZooError(
                f"an image of {self.info.name} has {count} ids, (B, {count}), got shape {tuple(ids.shape)}; a language "
                "model has to write all of them."
            )
        return tokens

    def _from_codes(self, ids: Tensor) -> Tensor:
        if not self.config.retrieval:
            raise ZooError(
                f"{self.info.name} was loaded without the branch that gives queries back from ids; use "
                "features(images, quantized=False), or weights that have it."
            )
        return self.reconstructed(self.decoded(self.quantizer.codes(ids).to(self.dtype)))

    # What makes pixels.

    @property
    def decoder(self) -> Any | None:
        """What makes pixels of embeddings, loaded when it is first asked for; None: nothing does."""
        if not self._attached and self.config.decoder:
            self.attach(self.config.decoder)
        return self._attached[0] if self._attached else None

    def attach(self, decoder: Any) -> SeedTokenizer:
        """Make `decode` give pixels, through a decoder of zoo.tokenizers.seed or what `config.decoder` may be.

        Raises ZooError when it cannot be had, or takes embeddings of another shape.
        """
        shape = self.config.head.shape
        if isinstance(decoder, str):
            from zoo.tokenizers.seed.decoders import load_decoder

            decoder = load_decoder(decoder, shape)
        if tuple(decoder.embed_shape) != shape:
            raise ZooError(
                f"the decoder takes embeddings of shape {tuple(decoder.embed_shape)} and {self.info.name} makes "
                f"{shape}; choose the one that was made for its image encoder."
            )
        self._attached = [decoder]
        self.info = replace(self.info, decodes_to="pixels")
        return self


TINY_WORDS = (*TEXT_MARKS, *SCENE_WORDS.split()[2:])

PRESETS = {
    "seed-2": Preset(
        SeedTokenizer,
        SeedConfig(),
        "published SEED-2, of SEED-LLaMA: 224 x 224 images, 32 ids, the embedding of unCLIP",
        Weights("hf://AILab-CVC/seed-tokenizer-2/seed_quantizer.pt"),
    ),
    "seed": Preset(
        SeedTokenizer,
        SeedConfig(head=HeadConfig("qformer", 768, num_queries=77)),
        "SEED-1 at its published sizes: 224 x 224 images, 32 ids, the 77 text features of Stable Diffusion 1",
        None,
    ),
    "seed-tiny": Preset(
        SeedTokenizer,
        SeedConfig(
            image_size=64,
            encoder=EVAConfig(patch_size=8, width=128, depth=4, num_heads=4, mlp_ratio=4.0, class_token=False),
            qformer=QFormerConfig(
                width=96,
                depth=4,
                num_heads=4,
                hidden=384,
                dropout=0.0,
                vocab_size=len(TINY_WORDS),
                max_positions=67,
                init_std=0.057,
            ),
            codebook_size=512,
            commitment=0.25,
            ema_decay=0.99,
            restart_below=0.5,
            decoder_depth=2,
            decoder_heads=4,
            head=HeadConfig(dim=128, widths=(96, 48, 32)),
            text_dim=96,
            text_length=67,
            text_tokenizer="",
            vocabulary=TINY_WORDS,
            decoder="seed-tiny-decoder",
        ),
        "small SEED trained on the embedded scenes and their captions: 64 x 64 images, 32 ids of 512",
        Weights("seed-tiny.safetensors", "7e693e96f521f0db882629896d5287320454157d9a18585c4e9827a96eb7f808"),
    ),
}
