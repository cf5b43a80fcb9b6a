"""KARL (arXiv 2507.07995): one pass writes an image into 1D latents and says how many of them it needs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.autoencoder import to_map, to_tokens
from zoo.nn.transformer import Block
from zoo.quantizers import Quantized, codebook_quantizer
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights
from zoo.tokenizers.kl.tokenizer import KLConfig, KLTokenizer
from zoo.tokenizers.vqgan import tokenizer as vqgan
from zoo.tokenizers.vqgan.tokenizer import VQGANConfig, VQGANTokenizer

QUALITY_BINS = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1),
    *(0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.38),
)


@dataclass(frozen=True)
class KarlConfig:
    """Sizes of KARL; the defaults are the released karl_small on the VQGAN, with quantised latents."""

    base: VQGANConfig | KLConfig = field(default_factory=VQGANConfig)
    """The 2D tokenizer that is distilled; its class decides which."""
    image_size: int = 256
    """Side of the square images it is made for; images twice as wide are taken too."""
    quantize: bool = True
    """Latents become codes; False: they stay continuous."""
    encoder_width: int = 1024
    encoder_depth: int = 8
    encoder_heads: int = 8
    decoder_width: int = 1024
    decoder_depth: int = 8
    decoder_heads: int = 8
    latent_dim: int = 12
    codebook_size: int = 4096
    commitment: float = 0.25
    ema_decay: float = 0.0
    """Codes become running means with this decay, started from data (not published, for training small codebooks); 0:
    learned by gradient, as published."""
    restart_below: float = 0.0
    """Of running means, those whose count in a batch falls below this are restarted from data; 0: never."""
    num_slots: int = 512
    """Rows of the tables of latent queries and positions: no image can have more tokens."""
    max_tokens: int = 256
    """Queries of a pass, unless fewer or more are asked for; those of the second phase of training."""
    trained_slots: int = 368
    """Largest budget that training draws: later slots have no training."""
    halting_width: int = 512
    halting_threshold: float = 0.75
    """A token whose halting probability is above this is dropped."""
    quality: float = 0.05
    """Wanted mean absolute error on [0, 1] when none is said."""
    quality_bins: tuple[float, ...] = QUALITY_BINS
    """Errors for which there is an embedding, rising; an error takes the first bin that is not below it."""
    init: str = "published"
    """Fresh weights: "published", or "aligned", a head start for small networks in which each slot begins by reading
    and writing a place of the grid; see `align`."""
    position_grid: int = 64
    """Side of the tables of grid positions, from which a grid takes every n-th row and column."""

    def __post_init__(self):
        for name in ("encoder", "decoder"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if heads < 1 or width % heads:
                raise ZooError(f"KarlConfig.{name}_width {width} is no multiple of {name}_heads {heads}.")
        if self.encoder_width <= self.base.embed_dim:
            raise ZooError(
                f"KarlConfig.encoder_width {self.encoder_width} must be above the base's embed_dim "
                f"{self.base.embed_dim}, which is a part of it."
            )
        if self.init not in ("published", "aligned"):
            raise ZooError(f"KarlConfig.init must be 'published' or 'aligned', got {self.init!r}.")
        if not 0 < self.max_tokens <= self.trained_slots <= self.num_slots:
            raise ZooError(
                "KarlConfig needs 0 < max_tokens <= trained_slots <= num_slots, got "
                f"{self.max_tokens}, {self.trained_slots} and {self.num_slots}."
            )
        if self.image_size < 1 or self.image_size % self.base.downsample:
            raise ZooError(
                f"KarlConfig.image_size {self.image_size} is no multiple of {self.base.downsample}, the pixels of the "
                "base for a place of its grid."
            )
        bins = self.quality_bins
        if not bins or list(bins) != sorted(set(bins)) or bins[0] <= 0:
            raise ZooError(f"KarlConfig.quality_bins must be errors above 0 in rising order, got {bins}.")
        if not 0 <= self.quality <= bins[-1]:
            raise ZooError(f"KarlConfig.quality must be an error from 0 to {bins[-1]}, got {self.quality}.")


class DistillationEncoder(nn.Module):
    """Reads the wanted quality, the grid and T latent queries; writes T latents and their halting logits."""

    def __init__(self, c: KarlConfig):
        super().__init__()
        width, patch = c.encoder_width, c.base.downsample
        self.patch_embed = nn.Conv2d(c.base.in_channels, width - c.base.embed_dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(width, c.position_grid, c.position_grid))
        self.quality_embedding = nn.Parameter(torch.empty(len(c.quality_bins), width))
        self.latent_tokens = nn.Parameter(torch.empty(c.num_slots, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, c.encoder_heads) for _ in range(c.encoder_depth))
        self.halting = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, c.halting_width), nn.Tanh(), nn.Linear(c.halting_width, 1)
        )
        self.to_latent = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, c.latent_dim))

    def grid_tokens(self, values: Tensor, features: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) and features of the base (B, E, h, w) to (B, W, h, w), patches first."""
        return torch.cat([self.patch_embed(values), features], dim=1)

    def forward(self, grid: Tensor, quality: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """grid_tokens (B, W, h, w) and bins (B,) int64 to halting logits (B, T) and latents (B, T, d)."""
        tokens = to_tokens(grid + grid_positions(self.positions, grid.shape[2:]))
        queries = self.latent_tokens[:num_tokens].expand(len(grid), -1, -1)
        x = self.norm_pre(torch.cat([self.quality_embedding[quality][:, None], tokens, queries], dim=1))
        for block in self.blocks:
            x = block(x)
        x = x[:, 1 + tokens.shape[1] :]
        return self.halting(x).squeeze(-1), self.to_latent(x)


class DistillationDecoder(nn.Module):
    """Writes the grid of the base from latents."""

    def __init__(self, c: KarlConfig):
        super().__init__()
        width = c.decoder_width
        outputs = c.base.codebook_size if isinstance(c.base, VQGANConfig) else c.base.embed_dim
        self.embed = nn.Linear(c.latent_dim, width)
        self.slot_positions = nn.Parameter(torch.empty(c.num_slots, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(width, c.position_grid, c.position_grid))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, c.decoder_heads) for _ in range(c.decoder_depth))
        self.norm_post = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, outputs))

    def forward(
        self, latents: Tensor, grid: Sequence[int], slots: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Latents (B, n, d) to (B, N, O) in raster order: logits of the base's codes, or its latents.

        grid: rows and columns, N in all; slots: (B, n) int64, the slot of each latent, default 0, 1, ...; mask: bool,
        broadcastable to (B, heads, N + n, N + n), True where a row may look at a column.
        """
        count = grid[0] * grid[1]
        slot = self.slot_positions[: latents.shape[1]] if slots is None else self.slot_positions[slots]
        places = self.mask_token + to_tokens(grid_positions(self.positions, grid))
        x = torch.cat([places.expand(len(latents), -1, -1), self.embed(latents) + slot], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm_post(x[:, :count]))


class KarlTokenizer(Tokenizer):
    """Maps images (B, 3, H, W) to up to max_tokens tokens each, and back.

    It takes images of the base's size, and those twice as wide (then decode needs grid=).
    """

    Config = KarlConfig

    def __init__(self, config: KarlConfig):
        super().__init__(config)
        c = config
        on_vqgan = isinstance(c.base, VQGANConfig)
        self.base = VQGANTokenizer(c.base) if on_vqgan else KLTokenizer(c.base)
        self.encoder = DistillationEncoder(c)
        if c.quantize:
            self.quantizer = codebook_quantizer(
                c.codebook_size,
                c.latent_dim,
                c.commitment,
                ema_decay=c.ema_decay,
                restart_below=c.restart_below,
                normalize=True,
            )
        self.decoder = DistillationDecoder(c)
        # as int32, so that to(bfloat16) leaves the bits of the float32 numbers alone
        bins = torch.tensor(c.quality_bins, dtype=torch.float32, device="cpu").view(torch.int32)
        self.register_buffer("_quality_bins", bins, persistent=False)
        self.initialize()
        self.info = TokenizerInfo(
            system="karl",
            paper="arXiv:2507.07995",
            image_size=c.image_size,
            size_multiple=None,
            channels=c.base.in_channels,
            kind="discrete" if c.quantize else "continuous",
            streams=("image",),
            codebook_sizes={"image": c.codebook_size} if c.quantize else {},
            latent_dims={} if c.quantize else {"image": c.latent_dim},
            embedding_dim=c.latent_dim if c.quantize else None,
            max_tokens=c.max_tokens,
            variable_length=True,
        )

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights as published; those of the base are left as they are."""
        for part in (self.encoder, self.decoder):
            for name, module in part.named_modules():
                if name.endswith("attn.qkv"):
                    nn.init.xavier_uniform_(module.weight)
                elif isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.zeros_(module.bias)
        encoder, decoder = self.encoder, self.decoder
        tables = (encoder.positions, encoder.latent_tokens, decoder.slot_positions, decoder.mask_token)
        for table in (*tables, decoder.positions):
            nn.init.normal_(table, std=self.config.encoder_width**-0.5)  # the encoder's width everywhere
        values = torch.tensor(self.config.quality_bins, device=encoder.quality_embedding.device)
        encoder.quality_embedding.copy_(values[:, None].expand_as(encoder.quality_embedding))
        if self.config.init == "aligned":
            side = self.config.image_size // self.config.base.downsample
            align(encoder.blocks, encoder.positions, encoder.latent_tokens, side)
            align(decoder.blocks, decoder.positions, decoder.slot_positions, side)
            patch = encoder.patch_embed
            nn.init.normal_(patch.weight, std=3 * patch.weight[0].numel() ** -0.5)
            patch.bias.copy_(-0.5 * patch.weight.sum((1, 2, 3)))  # mid-grey becomes 0
            for layer in (*encoder.to_latent, *decoder.head):
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.normal_(decoder.embed.weight)

    # The parts of a pass, in their order; training composes them too.

    def base_features(self, values: Tensor, sample_posterior: bool = True, noise: Tensor | None = None) -> Tensor:
        """Values (B, 3, H, W) to features of the base (B, E, h, w): before its quantizer, or its scaled latents.

        noise: what a sample of the KL autoencoder is made with, (B, E, h, w); drawn when left out.
        """
        if isinstance(self.base, VQGANTokenizer):
            return self.base.encoder(values)
        return self.base.scaled_latents(values, sample_posterior, noise)

    def quality_bin(self, error: Tensor) -> Tensor:
        """The first bin that is not below an error, the last if there is none: int64 of the same shape."""
        bins = self._quality_bins.view(torch.float32)
        return torch.bucketize(error.float(), bins).clamp(max=len(bins) - 1)

    def halts(self, logits: Tensor) -> Tensor:
        """(B, T) bool: tokens that are dropped."""
        return logits.float().sigmoid() > self.config.halting_threshold

    def quantize(self, z: Tensor) -> Quantized | None:
        """Latents (B, T, d) to their codes; None where latents are continuous."""
        return self.quantizer(z) if self.config.quantize else None

    def code_map(self, output: Tensor, grid: Sequence[int]) -> Tensor:
        """What the decoder wrote (B, N, O) to the code of the base (B, E, h, w).

        On a VQGAN that is the mixture of all codes by their probability, without gradient to the codes.
        """
        if isinstance(self.base, VQGANTokenizer):
            output = output.softmax(-1) @ self.base.quantizer.codebook.detach()
        return to_map(output, tuple(grid))

    def decode_code(self, code: Tensor) -> Tensor:
        """Code of the base (B, E, h, w) to values (B, 3, H, W), not clamped.

        On a KL autoencoder the code is not divided by the scale factor, as published; decoders are tuned with that.
        """
        return self.base.decoder(code) if isinstance(self.base, VQGANTokenizer) else self.base.decode_latents(code)

    def _encode(
        self,
        images: Tensor,
        quality: float | Tensor | None = None,
        max_tokens: int | None = None,
        num_tokens: int | None = None,
        target_error: float | None = None,
        sample_posterior: bool = True,
    ) -> Tokens:
        """Tokens of max_tokens positions, with a mask of those that are kept.

        Args:
            quality: wanted mean absolute error on [0, 1], one number or (B,); default: config.quality. It goes to the
                next bin of quality_bins.
            max_tokens: ceiling; default: config.max_tokens.
            num_tokens: keep exactly the first n slots of a pass with n queries, whatever the halting probabilities.
            target_error: instead of quality: a search, for each image, from the bin of this error downwards until the
                error that is measured on its reconstruction is met; one encoding and decoding per bin. Images for
                which no bin meets it keep their best tokens.
            sample_posterior: on a KL autoencoder, draw its latents as published, so that no two calls agree; False:
                take their mean.
        """
        length = self._length(max_tokens, num_tokens)
        grid = self.encoder.grid_tokens(images, self.base_features(images, sample_posterior))
        if target_error is None:
            bins = self.quality_bin(self._quality(quality, len(images)))
            return self._tokens(grid, bins, length, forced=num_tokens is not None)
        if quality is not None or num_tokens is not None:
            raise ZooError("target_error= searches the quality itself; leave quality= and num_tokens= out.")
        return self._search(images, grid, length, self._quality(target_error, len(images), "target_error"))

    def _tokens(self, grid: Tensor, bins: Tensor, length: int, forced: bool = False) -> Tokens:
        logits, z = self.encoder(grid, bins, length)
        mask = torch.ones_like(logits, dtype=torch.bool) if forced else ~self.halts(logits)
        if self.config.quantize:
            return Tokens(ids={"image": self.quantizer.encode(z)}, mask=mask)
        return Tokens(latents={"image": z}, mask=mask)

    def _search(self, images: Tensor, grid: Tensor, length: int, target: Tensor) -> Tokens:
        bins = self.quality_bin(target)
        best = tokens = self._tokens(grid, bins, length)
        streams = [*best.ids.values(), *best.latents.values(), best.mask]
        errors = torch.full_like(target, torch.inf)
        pending = torch.arange(len(images), device=images.device)
        while True:
            output = self._decode(tokens, grid.shape[2:]).clamp(0, 1)
            found = (output - images[pending]).abs().flatten(1).mean(1).float()
            better = found < errors[pending]
            errors[pending[better]] = found[better]
            for kept, new in zip(streams, [*tokens.ids.values(), *tokens.latents.values(), tokens.mask], strict=True):
                kept[pending[better]] = new[better]
            bins[pending] -= 1
            pending = pending[(found > target[pending]) & (bins[pending] >= 0)]
            if not len(pending):
                return best
            tokens = self._tokens(grid[pending], bins[pending], length)

    def _decode(self, tokens: Tokens, grid: Sequence[int] | None = None) -> Tensor:
        """grid: rows and columns of the base's grid, for images that are no squares of the size it was made for.

        Only live tokens are decoded, each with the position of its slot.
        """
        grid = grid or (self.config.image_size // self.config.base.downsample,) * 2
        latents = self._embed(tokens) if self.config.quantize else tokens.latents["image"].to(self.dtype)
        slots = mask = None
        if not tokens.mask.all():
            latents, slots, live = gather_live(latents, tokens.mask)
            if not live.all():
                mask = F.pad(live, (grid[0] * grid[1], 0), value=True)[:, None, None]
        return self.decode_code(self.code_map(self.decoder(latents, grid, slots, mask), grid))

    def reconstruct(self, images: Tensor, **settings) -> Tensor:
        """decode(encode(images, **settings)), for images of any shape that is taken."""
        tokens = self.encode(images, **settings)
        return self.decode(tokens, grid=[side // self.config.base.downsample for side in images.shape[-2:]])

    def check_size(self, height: int, width: int, want: str) -> None:
        size = self.info.image_size
        if (height, width) not in ((size, size), (size, 2 * size)):
            raise ZooError(
                f"{want} of {size} x {size} or {size} x {2 * size} pixels, got {height} x {width}; resize or crop."
            )

    def check_tokens(self, tokens: Tokens, streams: Sequence[str] | None = None) -> Tokens:
        tokens = super().check_tokens(tokens, streams)
        if tokens.mask.shape[1] > self.config.num_slots:
            raise ZooError(
                f"{self.info.name} has {self.config.num_slots} slots for tokens, got {tokens.mask.shape[1]} positions."
            )
        return tokens

    def _length(self, max_tokens: int | None, num_tokens: int | None) -> int:
        if max_tokens is not None and num_tokens is not None:
            raise ZooError("give max_tokens=, a ceiling, or num_tokens=, an exact count, not both.")
        name, length = ("num_tokens", num_tokens) if max_tokens is None else ("max_tokens", max_tokens)
        length = self.config.max_tokens if length is None else length
        slots = self.config.num_slots
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= slots:
            raise ZooError(f"{name} of {self.info.name} is an integer from 1 to its {slots} slots, got {length!r}.")
        if length > self.config.trained_slots:
            warnings.warn(
                f"{self.info.name} was trained with up to {self.config.trained_slots} tokens; the slots up to "
                f"{name}={length} have their initial values.",
                stacklevel=4,
            )
        return length

    def _quality(self, value: float | Tensor | None, batch: int, name: str = "quality") -> Tensor:
        """(B,) float32 errors that were asked for, or ZooError."""
        highest = self.config.quality_bins[-1]
        want = f"{name} of {self.info.name} is a mean absolute error on [0, 1] from 0 to {highest} (learned range)"
        value = self.config.quality if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise ZooError(f"{want}, a number or a tensor (B,), got {value!r}.")
        errors = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        if errors.ndim > 1 or (errors.ndim == 1 and len(errors) != batch):
            raise ZooError(f"{want}, one or one for each of {batch} images, got shape {tuple(errors.shape)}.")
        low, high = (bound.item() for bound in torch.aminmax(errors))
        top = torch.tensor(highest, dtype=torch.float32).item()
        if not (low >= 0 and high <= top):  # false for NaN too
            got = f"values from {low:.4g} to {high:.4g}" if errors.ndim else f"{errors.item():.4g}"
            raise ZooError(f"{want}, got {got}.")
        return errors.expand(batch).clone()


@torch.no_grad()
def align(blocks: nn.ModuleList, positions: Tensor, slots: Tensor, side: int) -> None:
    """Initial weights with which slots and places of the grid look at each other from the first step on.

    A slot starts as minus the position of one place, in an order in which the first n slots are spread evenly over the
    grid. Queries of the first block are minus what they come from and keys what they come from, so that a slot looks at
    its place and a place at its slot, and neither at itself; it copies what it sees.
    """
    nn.init.normal_(positions, std=0.5)
    places = to_tokens(grid_positions(positions, (side, side)))[0]
    order = spread(side).to(places.device)[: len(slots)]
    slots[: len(order)] = -places[order]
    nn.init.normal_(slots[len(order) :], std=0.5)
    for i, block in enumerate(blocks):
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.normal_(layer.weight, std=0.7 * layer.in_features**-0.5)
        if i == 0:
            identity = torch.eye(block.attn.proj.in_features, device=positions.device)
            for weight, scale in zip(block.attn.qkv.weight.chunk(3), (-1.5, 1.5, 1.0), strict=True):
                weight.copy_(scale * identity)
            block.attn.proj.weight.copy_(identity)


def spread(side: int) -> Tensor:
    """(side * side,) int64: the places of a grid in an order whose beginnings cover it evenly.

    Always the place that is farthest from all before it, the first of several.
    """
    number = torch.arange(side * side, device="cpu")  # computed even where weights are on the meta device
    places = torch.stack([number // side, number % side], dim=1).float()
    distances = torch.cdist(places, places)
    order = [int(distances.max(1).values.argmin())]
    nearest = distances[order[0]].clone()
    while len(order) < len(places):
        order.append(int(nearest.argmax()))
        nearest = nearest.minimum(distances[order[-1]])
    return torch.tensor(order, device="cpu")


def grid_positions(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table of positions (W, G, G) at a grid of (h, w) places by the nearest entry: (1, W, h, w)."""
    return F.interpolate(table[None], tuple(grid))


def gather_live(latents: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Live latents of (B, T, d) moved to the front and cut to the longest image of the batch.

    Returns them (B, n, d), their slots (B, n) int64, and which are live (B, n).
    """
    longest = int(mask.sum(1).max())
    slots = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return latents.take_along_dim(slots[..., None], dim=1), slots, mask.gather(1, slots)


def halting_mask(keep: Tensor, num_places: int) -> Tensor:
    """The masked form of dropping tokens (section 3 of the paper): bool (B, N + T, N + T), True where a row looks.

    keep: (B, T) bool. A dropped token looks at itself alone and nobody looks at it; grid places, which come first, are
    always kept.
    """
    keep = F.pad(keep, (num_places, 0), value=True)
    return (keep[:, :, None] & keep[:, None, :]) | torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)


PUBLISHED = {
    # name: width, depth and heads of the encoder, then of the decoder
    "small": (1024, 8, 8, 1024, 8, 8),
    "tiny": (512, 8, 8, 512, 8, 8),
    "tiny-semilarge-decoder": (512, 8, 8, 1024, 8, 8),
    "small-decoder-small": (1024, 8, 8, 512, 8, 8),
    "small-decoder-base": (1024, 8, 8, 768, 12, 12),
    "small-decoder-base-semilarge-feat": (1024, 8, 8, 1024, 12, 16),
    "small-decoder-semilarge": (1024, 8, 8, 1024, 16, 16),
    "small-decoder-semilarge-small-heads": (1024, 8, 8, 1024, 16, 8),
    "small-decoder-semilarge-opposite-heads": (1024, 8, 16, 1024, 16, 8),
    "small-decoder-semilarge-semilarge-heads": (1024, 8, 16, 1024, 16, 16),
    "base": (768, 12, 12, 768, 12, 12),
    "base-decoder-small-semilarge-feat": (1024, 12, 16, 1024, 8, 8),
    "semilarge": (1024, 16, 16, 1024, 16, 16),
    "semilarge-decoder-small": (1024, 16, 16, 1024, 8, 8),
}
RELEASED = "from the links of the README of https://github.com/ShivamDuggal4/karl"


def _published() -> dict[str, Preset]:
    presets = {}
    for size, sizes in PUBLISHED.items():
        for base, config in (("vqgan", VQGANConfig()), ("vae", KLConfig())):
            for latents in ("quantized", "continuous"):
                fields = ("encoder_width", "encoder_depth", "encoder_heads")
                fields += ("decoder_width", "decoder_depth", "decoder_heads")
                name = f"karl-{size}-{base}" + ("-continuous" if latents == "continuous" else "")
                presets[name] = Preset(
                    KarlTokenizer,
                    KarlConfig(base=config, quantize=latents == "quantized", **dict(zip(fields, sizes, strict=True))),
                    f"256 x 256 images, up to 256 {latents} tokens",
                    Weights(manual=f"karl_small_{base}_{latents}_latents.pth {RELEASED}") if size == "small" else None,
                    "none stated by the authors (all rights reserved)",
                )
    return presets


PRESETS = {
    **_published(),
    "karl-tiny": Preset(
        KarlTokenizer,
        KarlConfig(
            base=vqgan.PRESETS["vqgan-tiny"].config,
            image_size=64,
            encoder_width=128,
            encoder_depth=4,
            encoder_heads=4,
            decoder_width=128,
            decoder_depth=4,
            decoder_heads=4,
            codebook_size=512,
            ema_decay=0.97,
            restart_below=0.7,
            init="aligned",
            num_slots=96,
            max_tokens=64,
            trained_slots=92,
            halting_width=128,
            position_grid=16,
        ),
        "small KARL trained on the embedded scenes: 64 x 64 images, up to 64 tokens of 512 codes",
        Weights("karl-tiny.safetensors", "c0e4abcf0220f97f41ee40f85ee435a06de83611b23dad73c9c24b53038e44b3"),
    ),
}
