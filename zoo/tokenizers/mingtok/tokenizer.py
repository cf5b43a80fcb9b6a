"""MingTok (arXiv 2510.06590): continuous latents, semantic features grown from them causally, pixels from those."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.errors import ZooError, shortened
from zoo.nn.autoencoder import to_tokens
from zoo.nn.cache import Cache
from zoo.nn.patches import unpatchify
from zoo.nn.transformer import Block, Mlp, SwiGLU
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights

EPS = 1e-6
"""Of every LayerNorm."""

MLPS = {"mlp": Mlp, "swiglu": SwiGLU}

MAX_RMS = 4.0
"""Latents whose root mean square is above this are taken for latents that were not normalised. Normalised ones have one
of about 1 over a data set, and the published ones without normalisation have 8."""


@dataclass(frozen=True)
class MingTokConfig:
    """Sizes of MingTok; the defaults are the published MingTok-Vision."""

    image_size: int = 512
    """Side of the square images it is made for; others are encoded with positions that are resized."""
    patch_size: int = 32
    """Pixels for a latent, along a side."""
    in_channels: int = 3
    latent_dim: int = 32
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_mlp: str = "swiglu"
    """"swiglu" or "mlp"."""
    semantic_width: int = 1024
    semantic_depth: int = 24
    semantic_mlp: str = "swiglu"
    pixel_patch_size: int = 16
    """Pixels for a token of the pixel decoder, along a side."""
    pixel_width: int = 1024
    pixel_depth: int = 24
    head_dim: int = 64
    """Width of an attention head everywhere."""
    latent_mean: float = 1.46817409
    latent_scale: float = 8.09449291
    """Latents of the contract are (latent - latent_mean) / latent_scale, one pair of numbers for all channels."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ZooError(f"MingTokConfig.{name} must be at least 1, got {value}.")
        for part, whole in (
            ("patch_size", "image_size"),
            ("pixel_patch_size", "patch_size"),
            ("head_dim", "encoder_width"),
            ("head_dim", "semantic_width"),
            ("head_dim", "pixel_width"),
            ("latent_dim", "encoder_width"),
            ("latent_dim", "semantic_width"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ZooError(
                    f"MingTokConfig.{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}."
                )
        for name in ("encoder_mlp", "semantic_mlp"):
            if getattr(self, name) not in MLPS:
                raise ZooError(f"MingTokConfig.{name} must be 'mlp' or 'swiglu', got {getattr(self, name)!r}.")
        if not (math.isfinite(self.latent_mean) and 0 < self.latent_scale < math.inf):
            raise ZooError(
                "MingTokConfig needs a finite latent_mean and a latent_scale above 0, "
                f"got {self.latent_mean} and {self.latent_scale}."
            )

    @property
    def grid(self) -> int:
        """Latents along a side of an image of image_size."""
        return self.image_size // self.patch_size

    @property
    def is_normalized(self) -> bool:
        """Whether the statistics of the latents are known, and not the placeholders 0 and 1."""
        return (self.latent_mean, self.latent_scale) != (0.0, 1.0)


def blocks(width: int, depth: int, mlp: str, c: MingTokConfig) -> nn.ModuleList:
    return nn.ModuleList(Block(width, width // c.head_dim, mlp=MLPS[mlp], eps=EPS) for _ in range(depth))


class LowLevelEncoder(nn.Module):
    """Writes one latent for each patch, and one for the whole image."""

    def __init__(self, c: MingTokConfig):
        super().__init__()
        self.grid, self.latent_dim = c.grid, c.latent_dim
        self.patch_embed = nn.Conv2d(c.in_channels, c.encoder_width, c.patch_size, stride=c.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.encoder_width))
        self.pos_embed = nn.Parameter(torch.empty(1, c.grid**2 + 1, c.encoder_width))
        self.blocks = blocks(c.encoder_width, c.encoder_depth, c.encoder_mlp, c)
        self.out_norm = nn.LayerNorm(c.encoder_width, EPS)
        self.out_proj = nn.Linear(c.encoder_width, c.latent_dim)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Embeddings (1, rows * columns + 1, W) of a grid in raster order, that of the image last."""
        if rows == columns == self.grid:
            return self.pos_embed
        table = rearrange(self.pos_embed[:, :-1].float(), "1 (h w) d -> 1 d h w", h=self.grid)
        # published: sampled at these scales, 0.1 included, and not at those of the sizes
        scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        table = to_tokens(F.interpolate(table, scale_factor=scale, mode="bicubic"))
        return torch.cat([table.to(self.pos_embed.dtype), self.pos_embed[:, -1:]], dim=1)

    def forward(self, values: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Values (B, 3, H, W) to latents that are not normalised (B, N + 1, C): patches in raster order, image last.

        mask: (B, N) bool, True for patches that are hidden: their embedding is replaced by mask_token (1, 1, W), which
        is part of a training and not of the tokenizer.
        """
        embedded = self.patch_embed(values)
        x = to_tokens(embedded)
        if mask is not None:
            if mask_token is None or mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise ZooError(
                    f"masked encoding takes a mask_token and a bool mask of {tuple(x.shape[:2])}, "
                    f"got {mask.dtype} {tuple(mask.shape)}{' and no mask_token' if mask_token is None else ''}."
                )
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], dim=1) + self.positions(*embedded.shape[2:])
        for block in self.blocks:
            x = block(x)
        shortcut = x.unflatten(-1, (self.latent_dim, -1)).mean(-1)
        return shortcut + self.out_proj(F.gelu(self.out_norm(x)))


class SemanticDecoder(nn.Module):
    """Grows latents into semantic features, each from those up to it in raster order.

    There is no position embedding: the causal mask alone tells the order.
    """

    def __init__(self, c: MingTokConfig):
        super().__init__()
        self.repeats = c.semantic_width // c.latent_dim
        self.in_proj = nn.Linear(c.latent_dim, c.semantic_width)
        self.blocks = blocks(c.semantic_width, c.semantic_depth, c.semantic_mlp, c)
        self.norm = nn.LayerNorm(c.semantic_width, EPS)

    def embed(self, latents: Tensor) -> Tensor:
        return self.in_proj(latents) + latents.repeat_interleave(self.repeats, dim=-1)

    def forward(self, latents: Tensor) -> Tensor:
        """All at once: latents that are not normalised (B, n, C) to features (B, n, D)."""
        x = self.embed(latents)
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.norm(x)

    def step(self, latent: Tensor, cache: Cache) -> Tensor:
        """The next latent (B, C), not normalised, to its feature (B, D); the cache has those before it."""
        x = self.embed(latent[:, None])
        for number, block in enumerate(self.blocks):
            x = block(x, remember=partial(cache.update, number, start=cache.size))
        cache.size += 1
        return self.norm(x)[:, 0]


class PixelDecoder(nn.Module):
    """Turns semantic features into pixels: cells become finer tokens, which all look at each other.

    There is no position embedding: where a token is must be in its features.
    """

    def __init__(self, c: MingTokConfig):
        super().__init__()
        self.ratio, self.patch_size = c.patch_size // c.pixel_patch_size, c.pixel_patch_size
        self.embed = nn.Linear(c.semantic_width, self.ratio**2 * c.pixel_width)
        self.blocks = blocks(c.pixel_width, c.pixel_depth, "mlp", c)
        self.norm = nn.LayerNorm(c.pixel_width, EPS)
        self.head = nn.Linear(c.pixel_width, c.in_channels * c.pixel_patch_size**2)

    def cells_to_tokens(self, cells: Tensor) -> Tensor:
        """Embedded cells (B, N, r r W) to tokens (B, r r N, W) in raster order of the finer grid."""
        side = math.isqrt(cells.shape[1])
        return rearrange(cells, "b (h w) (r s d) -> b (h r w s) d", h=side, r=self.ratio, s=self.ratio)

    def patches(self, features: Tensor) -> Tensor:
        """Features (B, N, D) of a square grid to patches of pixel_patch_size, see zoo.nn.patches.patchify."""
        # published: the pixels are computed in float32 where everything else is in bfloat16 by autocast
        with torch.autocast(features.device.type, enabled=False):
            x = self.cells_to_tokens(self.embed(features.to(self.embed.weight.dtype)))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, N, D) of a square grid to values (B, 3, H, W), not clamped."""
        side = self.ratio * math.isqrt(features.shape[1])
        return unpatchify(self.patches(features), self.patch_size, (side, side))


class MingTokTokenizer(Tokenizer):
    """Maps images (B, 3, H, W) to one latent for each patch in raster order, to semantic features, and back.

    Images of any multiple of patch_size are encoded and have features; square ones are decoded. Latents of the contract
    are normalised: the space in which a language model with a flow head writes (zoo.tokenizers.mingtok.head).
    """

    Config = MingTokConfig

    def __init__(self, config: MingTokConfig):
        super().__init__(config)
        c = config
        self.encoder = LowLevelEncoder(c)
        self.semantic_decoder = SemanticDecoder(c)
        self.pixel_decoder = PixelDecoder(c)
        self.initialize()
        self.info = TokenizerInfo(
            system="mingtok",
            paper="arXiv:2510.06590",
            image_size=c.image_size,
            size_multiple=c.patch_size,
            channels=c.in_channels,
            kind="continuous",
            streams=("image",),
            latent_dims={"image": c.latent_dim},
            max_tokens=c.grid**2,
        )

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights of the zoo's choice, as usual for vision transformers; the authors' are not published."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for table in (self.encoder.cls_token, self.encoder.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    # The parts of a pass, in their order; training composes them, and the networks, too.

    def to_values(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to values of the networks in [-1, 1]."""
        return 2 * images - 1

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents as the encoder writes them to latents of the contract."""
        return (latents - self.config.latent_mean) / self.config.latent_scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents of the contract to what the semantic decoder reads."""
        return latents * self.config.latent_scale + self.config.latent_mean

    def to_images(self, values: Tensor) -> Tensor:
        """Values of the networks to images in [0, 1]."""
        return (values.clamp(-1, 1) + 1) / 2

    def _encode(self, images: Tensor) -> Tokens:
        patch = self.config.patch_size
        latents = self.normalize(self.encoder(self.to_values(images))[:, :-1])
        return Tokens(latents={"image": latents}, grid=(images.shape[2] // patch, images.shape[3] // patch))

    def _features(self, images: Tensor) -> Tensor:
        # the latent of the image comes last, so that the causal decoder shows it to no patch
        return self.semantic_decoder(self.encoder(self.to_values(images))[:, :-1])

    def _decode(self, tokens: Tokens) -> Tensor:
        count, grid = tokens.mask.shape[1], tokens.grid
        if count != math.isqrt(count) ** 2 or (grid and grid[0] != grid[1]):
            shape = f"{count} tokens" if grid is None else f"a grid of {grid[0]} x {grid[1]}"
            raise ZooError(
                f"{self.info.name} decodes square images, a square number of tokens in raster order such as "
                f"{self.info.max_tokens}, got {shape}; its features are defined for any grid."
            )
        return self.decode_features(self.features_of(tokens))

    @torch.no_grad()
    def features_of(self, tokens: Tokens | Tensor) -> Tensor:
        """Semantic features (B, n, D) of tokens, or of their latents (B, n, C), in one parallel pass.

        Feature i depends on the latents 0..i in raster order, so the beginning of an image is enough for its own
        features. Raises ZooError for tokens that are not this tokenizer's.
        """
        if isinstance(tokens, Tensor):
            tokens = Tokens(latents={"image": tokens})
        latents = self.check_tokens(tokens).latents["image"]
        return self._features_of(latents)

    def _features_of(self, latents: Tensor) -> Tensor:
        """The same of latents that are not checked again."""
        return self.semantic_decoder(self.denormalize(latents.to(self.dtype)))

    def new_cache(self, batch_size: int, max_tokens: int | None = None) -> Cache:
        """An empty cache for `step`, with room for max_tokens latents of each image (default: info.max_tokens)."""
        decoder, length = self.semantic_decoder, max_tokens or self.info.max_tokens
        return Cache(batch_size, length, decoder.blocks, decoder.norm.weight)

    @torch.no_grad()
    def step(self, latent: Tensor, cache: Cache) -> Tensor:
        """The next normalised latent (B, C) in raster order to its semantic feature (B, D), as features_of gives it.

        The cache, of new_cache, has the latents before it and receives this one. Raises ZooError when it is full or
        made for another batch.
        """
        if latent.shape != (cache.rows, self.config.latent_dim):
            raise ZooError(
                f"a step of {self.info.name} with this cache takes latents ({cache.rows}, {self.config.latent_dim}), "
                f"got shape {tuple(latent.shape)}."
            )
        if cache.size == cache.length:
            raise ZooError(f"the cache is full with {cache.length} tokens; make one with a larger max_tokens.")
        return self.semantic_decoder.step(self.denormalize(latent.to(self.device, self.dtype)), cache)

    @torch.no_grad()
    def decode_features(self, features: Tensor) -> Tensor:
        """Semantic features (B, N, D) of a whole square image in raster order to images (B, 3, H, W) in [0, 1].

        Raises ZooError for features of another shape.
        """
        width = self.config.semantic_width
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise ZooError(f"{self.info.name} decodes float features (B, N, {width}), got {shortened(features)}.")
        if features.ndim != 3 or features.shape[2] != width or math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
            raise ZooError(
                f"{self.info.name} decodes features (B, N, {width}) of a square image in raster order, N a square "
                f"number, got shape {tuple(features.shape)}."
            )
        return self.to_images(self.pixel_decoder(features.to(self.device)))

    def check_tokens(self, tokens: Tokens, streams: Sequence[str] | None = None) -> Tokens:
        tokens = super().check_tokens(tokens, streams)
        latents = tokens.latents["image"]
        rms = latents.float().square().mean().sqrt().item()
        # a few values, and those of a tokenizer whose statistics are not known yet, say nothing
        if self.config.is_normalized and latents.numel() >= 256 and not rms <= MAX_RMS:
            raise ZooError(
                f"{self.info.name} decodes normalised latents, with a root mean square of about 1 (up to {MAX_RMS:g}), "
                f"got {rms:.3g}; if they are as the encoder writes them, use tokenizer.normalize(latents)."
            )
        return tokens


PRESETS = {
    "mingtok-vision": Preset(
        MingTokTokenizer,
        MingTokConfig(),
        "published MingTok-Vision: 512 x 512 images, 256 latents of 32 values, features of 1024",
        Weights("hf://inclusionAI/MingTok-Vision/model.safetensors"),
        "as its page https://huggingface.co/inclusionAI/MingTok-Vision says (code: MIT)",
    ),
    "mingtok-tiny": Preset(
        MingTokTokenizer,
        MingTokConfig(
            image_size=64,
            patch_size=8,
            latent_dim=8,
            encoder_width=128,
            encoder_depth=4,
            semantic_width=192,
            semantic_depth=4,
            pixel_patch_size=4,
            pixel_width=96,
            pixel_depth=3,
            head_dim=32,
            latent_mean=0.0,
            latent_scale=1.0,
        ),
        "small MingTok trained on the embedded scenes: 64 x 64 images, 64 latents of 8 values, features of 192",
        Weights("mingtok-tiny.safetensors", "7bea769044e073e107d667dcbb7c202abb321504224ca93b17816b65b3757390"),
    ),
}
