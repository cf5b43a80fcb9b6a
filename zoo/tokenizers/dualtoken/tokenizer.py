"""DualToken (arXiv 2503.14324): an image encoder with a codebook for meaning deep in it and one for pixels early on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.autoencoder import AutoencoderConfig, Decoder, ResnetBlock, to_map
from zoo.quantizers import ResidualQuantized, ResidualQuantizer
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights
from zoo.tokenizers.dualtoken.projection import AttentionProjection
from zoo.tokenizers.siglip.encoder import PRESETS as SIGLIP
from zoo.tokenizers.siglip.encoder import SigLIPConfig, SigLIPEncoder, to_values


@dataclass(frozen=True)
class StreamConfig:
    """A residual quantizer, see zoo.quantizers.ResidualQuantizer."""

    codebook_size: int | tuple[int, ...] = 16384
    """K, or one of each level where codebooks are not shared."""
    levels: int = 4
    decay: float | tuple[float, ...] = 0.99
    kind: str = "rq"
    """"rq" or "rq_ema"."""
    shared: bool = True
    """One codebook for all levels."""
    restart: bool = True
    """Codes that are hardly used are drawn anew from data."""
    ema_vectors: str = "final"
    """"final", as published, or "level"; of kind "rq_ema"."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes at each level."""
        size = self.codebook_size
        return (size,) * self.levels if isinstance(size, int) else tuple(size)


@dataclass(frozen=True)
class PixelDecoderConfig(AutoencoderConfig):
    """Sizes of the pixel decoder; the defaults are those for 256 x 256 images."""

    multipliers: tuple[int, ...] = (1, 1, 4, 4, 8)
    embed_dim: int = 1024
    latent_size: int = 0
    """Side of the grid it reads, to which the grid of patches is resized; 0: that of the patches."""

    LEAST_BLOCKS: ClassVar[int] = 0


@dataclass(frozen=True)
class DualTokenConfig:
    """Sizes of DualToken; the defaults are the published siglip_256_rvq4."""

    image_size: int = 256
    """Of the encoder; other sizes are not taken."""
    encoder: SigLIPConfig = SIGLIP["siglip2-so400m-patch16-256"].config
    layer_pixel: int = 6
    """After how many layers of the tower the pixel stream is taken."""
    layer_shortcut: int = 4
    """After how many layers what is added to it is taken; 0: nothing is added."""
    shortcut_weight: float = 0.6
    layer_semantic: int = 26
    """After how many layers the semantic stream is taken; the layers behind it read its codes."""
    embed_dim: int = 32
    """Width of the codes."""
    semantic: StreamConfig = StreamConfig(kind="rq_ema")
    pixel: StreamConfig = StreamConfig(kind="rq")
    one_codebook: bool = False
    """The ablation of the paper: `semantic` alone codes for both tasks, and `pixel` is not used. It reads
    layer_semantic and, where layer_pixel is not 0, what the pixel stream would be, added to it."""
    decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)

    def __post_init__(self):
        depth, needed = self.encoder.depth, 0 if self.one_codebook else 1
        taps = self.layer_shortcut, self.layer_pixel, self.layer_semantic
        if not (0 <= taps[0] <= taps[2] and needed <= taps[1] <= taps[2] and 1 <= taps[2] <= depth):
            raise ZooError(
                f"DualTokenConfig needs {needed} <= layer_pixel <= layer_semantic, 0 <= layer_shortcut <= "
                f"layer_semantic and 1 <= layer_semantic <= {depth}, the depth of the tower; got {taps[1]}, {taps[0]} "
                f"and {taps[2]}."
            )
        if self.embed_dim < 1 or self.encoder.width % self.embed_dim:
            raise ZooError(
                f"DualTokenConfig.embed_dim {self.embed_dim} must divide the width of the tower {self.encoder.width}."
            )
        side = self.decoder.latent_size or self.grid
        pixels = side * self.decoder.downsample
        if not self.image_size == self.encoder.image_size == pixels:
            raise ZooError(
                f"DualTokenConfig.image_size is {self.image_size}, its encoder takes {self.encoder.image_size} and its "
                f"decoder makes {pixels} pixels of {side} places; all three must be the same (image_size, "
                "encoder.image_size, decoder.latent_size, decoder.multipliers)."
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.encoder.image_size // self.encoder.patch_size

    @property
    def streams(self) -> dict[str, StreamConfig]:
        """Quantizers by the stream of their ids."""
        return {"image": self.semantic} if self.one_codebook else {"semantic": self.semantic, "pixel": self.pixel}


class Latents(NamedTuple):
    """Vectors before quantisation, (B, N, embed_dim) each."""

    semantic: Tensor
    pixel: Tensor | None
    """None where one codebook serves both tasks."""


class DualTokenOutput(NamedTuple):
    """What a forward pass gives."""

    reconstruction: Tensor | None
    """(B, 3, S, S) values, not clamped."""
    features: Tensor
    """(B, N, D): quantised features in the place of those of layer_semantic."""
    pooled: Tensor
    """(B, D): the tower's embedding of the image, from quantised features, not normalised."""
    quantized: dict[str, ResidualQuantized]
    """By stream, in the order of info.streams."""

    @property
    def codes(self) -> Tensor:
        """(B, N, embed_dim of all streams) with gradient: what `embed` gives of the ids."""
        return torch.cat([quantized.quantized for quantized in self.quantized.values()], dim=-1)


class DualTokenTokenizer(Tokenizer):
    """Maps images (B, 3, S, S) to ids of two streams for each patch, to quantised features of the tower, and back.

    The semantic stream replaces the features of a deep layer, so that what follows in the tower (features, embeddings)
    reads ids alone; the pixel stream of shallow layers is what is decoded. ids: (B, N, levels) each.
    """

    Config = DualTokenConfig

    def __init__(self, config: DualTokenConfig):
        super().__init__(config)
        c = config
        width, dim, heads = c.encoder.width, c.embed_dim, c.encoder.width // c.embed_dim
        self.encoder = SigLIPEncoder(c.encoder)
        self.prequant_semantic = AttentionProjection(width, dim, heads)
        if c.layer_pixel:
            self.prequant_pixel = AttentionProjection(width, dim, heads)
        if c.layer_pixel and c.layer_shortcut:
            self.prequant_shortcut = AttentionProjection(width, dim, heads)
        self.quantizers = nn.ModuleDict(
            {
                name: ResidualQuantizer(
                    s.codebook_size, dim, s.levels, s.decay, s.kind, s.shared, s.ema_vectors, s.restart
                )
                for name, s in c.streams.items()
            }
        )
        self.postquant_semantic = AttentionProjection(dim, width, heads, causal=True)
        self.postquant_pixel = AttentionProjection(dim, width, heads, causal=True)
        self.bridge = ResnetBlock(width, c.decoder.embed_dim, c.decoder, kernel=1)
        self.decoder = Decoder(c.decoder, c.decoder.embed_dim)
        self.info = TokenizerInfo(
            system="dualtoken",
            paper="arXiv:2503.14324",
            image_size=c.image_size,
            size_multiple=None,
            channels=3,
            kind="discrete",
            streams=tuple(c.streams),
            decoded=("image" if c.one_codebook else "pixel",),
            codebook_sizes={name: max(stream.sizes) for name, stream in c.streams.items()},
            embedding_dim=c.embed_dim * len(c.streams),
            levels={name: stream.levels for name, stream in c.streams.items()},
            max_tokens=c.encoder.num_patches,
        )

    # The parts of a pass, in their order; training composes them, too.

    def latents(self, values: Tensor) -> Latents:
        """Values (B, 3, S, S) in [-1, 1] to what is quantised."""
        c, tower, taken = self.config, self.encoder.vision, {}
        h, layer = tower.embed(values), 0
        for stop in sorted({c.layer_shortcut, c.layer_pixel, c.layer_semantic}):
            h, layer = tower.layers(h, layer, stop), stop
            taken[stop] = h
        pixel, semantic = None, self.prequant_semantic(h)
        if c.layer_pixel:
            pixel = self.prequant_pixel(taken[c.layer_pixel])
            if c.layer_shortcut:
                pixel = pixel + c.shortcut_weight * self.prequant_shortcut(taken[c.layer_shortcut])
        if c.one_codebook:
            return Latents(semantic if pixel is None else semantic + pixel, None)
        return Latents(semantic, pixel)

    def to_features(self, codes: Tensor) -> Tensor:
        """Codes (B, N, embed_dim) of the semantic stream to features (B, N, D) in the place of layer_semantic."""
        return self.postquant_semantic(codes)

    def finish(self, features: Tensor) -> Tensor:
        """Features (B, N, D) in the place of layer_semantic to the output of the tower's last layer."""
        return self.encoder.vision.layers(features, self.config.layer_semantic)

    def to_values(self, codes: Tensor) -> Tensor:
        """Codes (B, N, embed_dim) of the pixel stream to values (B, 3, S, S), not clamped."""
        grid, side = self.config.grid, self.config.decoder.latent_size
        h = to_map(self.postquant_pixel(codes), (grid, grid))
        if side:
            h = F.interpolate(h, (side, side), mode="bilinear")
        return self.decoder(self.bridge(h))

    def forward(self, values: Tensor, decode: bool = True) -> DualTokenOutput:
        """Values (B, 3, S, S) in [-1, 1]; in training mode the codes move. decode: make a reconstruction, too."""
        semantic, pixel = self.latents(values)
        if pixel is None:
            quantized = {"image": self.quantizers["image"](semantic)}
        else:
            found = {name: self.quantizers[name](z) for name, z in (("pixel", pixel), ("semantic", semantic))}
            quantized = {name: found[name] for name in self.info.streams}
        meaning, picture = (quantized.get(name, quantized.get("image")).quantized for name in ("semantic", "pixel"))
        features = self.to_features(meaning)
        pooled = self.encoder.vision.pool(self.finish(features))
        return DualTokenOutput(self.to_values(picture) if decode else None, features, pooled, quantized)

    # The contract.

    def _encode(self, images: Tensor, levels: int | None = None) -> Tokens:
        """levels: ids of a patch in each stream, 1 to those of the stream; None: all."""
        most = max(self.info.levels.values())
        if levels is not None and not (type(levels) is int and 1 <= levels <= most):
            raise ZooError(f"{self.info.name} encodes with 1 to {most} levels, or None for all, got {levels!r}.")
        given = self.latents(to_values(images))
        z = {"image": given.semantic} if given.pixel is None else given._asdict()
        ids = {
            name: self.quantizers[name].encode(z[name], levels and min(levels, count))
            for name, count in self.info.levels.items()
        }
        return Tokens(ids, grid=(self.config.grid, self.config.grid))

    def _embed(self, tokens: Tokens) -> Tensor:
        return torch.cat([self.quantizers[name].codes(self._whole(tokens, name)) for name in self.info.streams], dim=-1)

    def _decode(self, tokens: Tokens) -> Tensor:
        (stream,) = self.info.decoded
        values = self.to_values(self.quantizers[stream].codes(self._whole(tokens, stream)).to(self.dtype))
        return (values + 1) / 2

    def _features(self, images: Tensor) -> Tensor:
        """(B, N, D): those of the tower after its post norm, from quantised features."""
        return self.encoder.vision.norm(self._last(self._encode(images)))

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.encoder.vision.pool(self._last(self._encode(images)))

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.encoder._encode_text(texts)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.encoder.logits(images, texts)

    @torch.no_grad()
    def features_of(self, tokens: Tokens) -> Tensor:
        """`features` (B, N, D) of an image from its ids. Raises ZooError for tokens that are not this tokenizer's."""
        return self.encoder.vision.norm(self._last(self.check_tokens(tokens, [self._meaning])))

    @torch.no_grad()
    def embedding_of(self, tokens: Tokens) -> Tensor:
        """`encode_image` (B, D) of an image from its ids, L2-normalised. Raises ZooError as features_of does."""
        pooled = self.encoder.vision.pool(self._last(self.check_tokens(tokens, [self._meaning])))
        return F.normalize(pooled, dim=-1)

    @torch.no_grad()
    def code_embeddings(self, tokens: Tokens) -> dict[str, Tensor]:
        """{stream: (B, N, levels, embed_dim)}: the code of each id, as a language model reads them.

        Of the streams that are there. Raises ZooError for ids that are not this tokenizer's.
        """
        ids = self.check_tokens(tokens, ()).ids
        return {name: self.quantizers[name].embeddings(one) for name, one in ids.items()}

    def check_tokens(self, tokens: Tokens, streams: Sequence[str] | None = None) -> Tokens:
        tokens = super().check_tokens(tokens, streams)
        for name, ids in tokens.ids.items():
            sizes = torch.tensor(self.config.streams[name].sizes[: ids.shape[2]], device=ids.device)
            if (ids >= sizes).any():
                raise ZooError(f"ids of stream '{name}' of {self.info.name} are below {sizes.tolist()} at its levels.")
        return tokens

    @property
    def _meaning(self) -> str:
        """The stream that features come from."""
        return self.info.streams[0]

    def _last(self, tokens: Tokens) -> Tensor:
        codes = self.quantizers[self._meaning].codes(self._whole(tokens, self._meaning))
        return self.finish(self.to_features(codes.to(self.dtype)))

    def _whole(self, tokens: Tokens, stream: str) -> Tensor:
        """The ids of a stream. Raises ZooError when they are not those of a whole image."""
        ids, count = tokens.ids[stream], self.info.max_tokens
        if ids.shape[1] != count:
            raise ZooError(
                f"ids of stream '{stream}' of {self.info.name} are (B, {count}, up to {self.info.levels[stream]}), one "
                f"row for each patch of an image, got shape {tuple(ids.shape)}."
            )
        return ids


PRESETS = {
    "dualtoken-256": Preset(
        DualTokenTokenizer,
        DualTokenConfig(),
        "DualToken at its published sizes: 256 x 256 images, 256 x 4 + 256 x 4 ids, SigLIP 2 So400m",
        None,
    ),
    "dualtoken-384": Preset(
        DualTokenTokenizer,
        DualTokenConfig(
            image_size=384,
            encoder=SIGLIP["siglip2-so400m-patch14-384"].config,
            semantic=StreamConfig(levels=8, kind="rq_ema"),
            pixel=StreamConfig(levels=8),
            decoder=PixelDecoderConfig(image_size=384, attention=(24,), latent_size=24),
        ),
        "DualToken at its published sizes: 384 x 384 images, 729 x 8 + 729 x 8 ids, SigLIP 2 So400m",
        None,
    ),
    "dualtoken-tiny": Preset(
        DualTokenTokenizer,
        DualTokenConfig(
            image_size=64,
            encoder=SIGLIP["siglip-tiny"].config,
            layer_pixel=2,
            layer_shortcut=1,
            layer_semantic=3,
            embed_dim=32,
            semantic=StreamConfig(512, 4, kind="rq_ema", ema_vectors="level"),
            pixel=StreamConfig(512, 4),
            decoder=PixelDecoderConfig(
                image_size=64,
                channels=16,
                multipliers=(1, 2, 4, 4),
                num_blocks=1,
                embed_dim=64,
                attention=(8,),
                norm_groups=8,
            ),
        ),
        "small DualToken on siglip-tiny, trained on the embedded scenes: 64 x 64 images, 64 x 4 + 64 x 4 ids of 512",
        Weights("dualtoken-tiny.safetensors", "023dff39d62584837559e156b70fb2ff503522271f9dedcc2c09dc39d35cafdd"),
    ),
}
