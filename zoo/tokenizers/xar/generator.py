"""xAR (arXiv 2502.20388): next-X prediction with flow matching over entities of continuous latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.errors import ZooError, expect_number, shortened
from zoo.flow import check_steps, euler, euler_maruyama, guide, heun, linear_scale
from zoo.hub import HubModel
from zoo.nn.autoencoder import to_tokens
from zoo.nn.cache import Cache
from zoo.nn.embedding import TimeEmbedding
from zoo.nn.precision import wide
from zoo.nn.rotary import grid_angles, rotate, turns
from zoo.tokenizer import Preset, Tokenizer, Tokens, Weights
from zoo.tokenizers.xar.entities import partition

TIMES = 1000
"""Time ids are trunc(TIMES * t)."""


FEW_LABELS = 32
"""Distinct labels up to which the modulations of all blocks at all times are kept: 0.4 GB for xAR-B."""


@dataclass(frozen=True)
class XARConfig:
    """Sizes of the generator; the defaults are the published xAR-B."""

    tokenizer: str = "kl-f16"
    """Name of the continuous tokenizer whose latents it generates."""
    grid: int = 16
    """Side of the grid of latents."""
    latent_dim: int = 16
    num_classes: int = 1000
    width: int = 768
    encoder_depth: int = 8
    encoder_heads: int = 12
    decoder_depth: int = 8
    decoder_heads: int = 12
    mlp_ratio: float = 4.0
    entity: str = "cell"
    """"patch", "cell", "subsample", "scale" or "image"; see zoo.tokenizers.xar.entities."""
    entity_size: int = 8
    """Side of a cell, or stride of a subsample."""
    scales: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Sides of the pictures of entity "scale"."""
    attention_dropout: float = 0.1
    dropout: float = 0.1
    label_dropout: float = 0.1
    """Share of labels that become "no class" in training."""
    class_names: tuple[str, ...] = ()
    """What the classes are called, if they have names."""
    num_steps: int = 40
    """Network calls for each entity when sampling, unless others are asked for."""
    guidance: float = 2.7

    def __post_init__(self):
        partition(self.entity, self.grid, self.entity_size, self.scales)
        for part in ("encoder", "decoder"):
            heads = getattr(self, f"{part}_heads")
            if heads < 1 or self.width % (4 * heads):
                raise ZooError(
                    f"XARConfig.width {self.width} must be a multiple of 4 times {part}_heads {heads}: a head turns "
                    "pairs of channels with the row and with the column."
                )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ZooError(f"XARConfig has {self.num_classes} classes and {len(self.class_names)} class_names.")
        if self.num_classes < 1 or self.latent_dim < 1:
            raise ZooError("XARConfig.num_classes and latent_dim must be at least 1.")
        if self.guidance < 0 or self.num_steps < 2:
            raise ZooError("XARConfig.guidance must not be below 0, and num_steps not below 2.")


@dataclass(frozen=True)
class GeneratorInfo:
    """What a caller has to know about a generator before using it."""

    system: str
    paper: str
    tokenizer: str
    """Name of the tokenizer whose latents it generates."""
    shape: tuple[int, int, int]
    """Channels, rows and columns of the latents of an image."""
    classes: tuple[str, ...]
    """Names, or numbers as text, of the classes."""
    name: str = "custom"
    licence: str = "Apache-2.0"


class RMSNorm(nn.RMSNorm):
    """In float32 whatever the autocast; eps 1e-6."""

    def __init__(self, width: int, weight: bool = True):
        super().__init__(width, eps=1e-6, elementwise_affine=weight)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(wide(x), self.normalized_shape, None, self.eps).to(x.dtype)
        return normed if self.weight is None else normed * self.weight


class Attention(nn.Module):
    """Multi-head attention with rotary queries and keys."""

    def __init__(self, width: int, num_heads: int, attention_dropout: float, dropout: float):
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None = None, remember=None) -> Tensor:
        """x (B, n, D); angles: of its tokens, see rotate; remember: (keys, values) -> keys, values to attend to."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = rotate(q, angles), rotate(k, angles)
        if remember is not None:
            k, v = remember(k, v)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))


class GatedMlp(nn.Module):
    """GEGLU (arXiv 2002.05202) with exact GELU; hidden width int(width * ratio * 2 / 3)."""

    def __init__(self, width: int, ratio: float, dropout: float):
        super().__init__()
        hidden = int(width * ratio * 2 / 3)
        self.gate, self.value, self.out = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.out(self.drop(F.gelu(self.gate(x)) * self.value(x))))


class Condition(NamedTuple):
    """What modulates tokens, computed once for all tokens and rows that share it."""

    values: Tensor
    """(..., D) distinct conditions."""
    spread: Callable[[Tensor], Tensor]
    """What was made of them (..., M) to what broadcasts over (rows, groups, tokens of a group, M)."""
    groups: int
    """Into how many groups of equal length the tokens of a row are cut."""
    made: Sequence[Tensor] | None = None
    """What each block makes of the values, where it is known already."""

    @classmethod
    def of_rows(cls, values: Tensor, rows: Tensor, made: Sequence[Tensor] | None = None) -> Condition:
        """Each row has that of the (U, D) values to which `rows` (R,) points."""
        return cls(values, lambda made: made[rows][:, None, None], 1, made)

    @classmethod
    def of_entities(cls, values: Tensor, lengths: Sequence[int]) -> Condition:
        """Each row has E of them, (R, E, D), for as many entities of these lengths."""
        if len(set(lengths)) == 1:
            return cls(values, lambda made: made[:, :, None], len(lengths))
        counts = torch.tensor(lengths, device=values.device)
        entity = torch.arange(len(lengths), device=values.device).repeat_interleave(counts)
        return cls(values, lambda made: made[:, None, entity], 1)


class Block(nn.Module):
    """Pre-norm block whose two parts are scaled, shifted and gated by the condition (adaLN, arXiv 2212.09748)."""

    RUNS = ("modulation_of",)  # beside forward; see zoo.training.sharding

    def __init__(self, width: int, num_heads: int, c: XARConfig):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width, weight=False), RMSNorm(width, weight=False)
        self.attn = Attention(width, num_heads, c.attention_dropout, c.dropout)
        self.mlp = GatedMlp(width, c.mlp_ratio, c.dropout)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation_of(self, values: Tensor) -> Tensor:
        """Conditions (..., D) to what forward modulates by, (..., 6 D)."""
        return self.modulation(values)

    def forward(self, x: Tensor, modulation: Tensor, angles: Tensor, mask=None, remember=None) -> Tensor:
        """x (R, groups, tokens, D); modulation: (..., 6 D) that broadcasts over it; others: see Attention."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        h = modulate(self.norm1(x), scale1, shift1).flatten(1, 2)
        x = torch.addcmul(x, gate1, self.attn(h, angles, mask, remember).view_as(x))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), scale2, shift2)))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def time_ids(t: Tensor) -> Tensor:
    """trunc(1000 t) of float32 times: the product is taken in float32, which decides some ids."""
    return (t.float() * TIMES).long()


class XARGenerator(HubModel, nn.Module, pipeline_tag="unconditional-image-generation"):
    """Generates latents of a continuous tokenizer for a class, entity by entity."""

    Config = XARConfig

    def __init__(self, config: XARConfig):
        super().__init__()
        c = self.config = config
        self.partition = partition(c.entity, c.grid, c.entity_size, c.scales)
        self.class_embedding = nn.Embedding(c.num_classes + 1, c.width)
        self.time_embedding = TimeEmbedding(c.width)
        self.embed = nn.Linear(c.latent_dim, c.width)
        self.encoder_positions = nn.Parameter(torch.empty(1, self.partition.length, c.width))
        self.embed_norm = RMSNorm(c.width)
        self.encoder_blocks = nn.ModuleList(Block(c.width, c.encoder_heads, c) for _ in range(c.encoder_depth))
        self.encoder_norm = RMSNorm(c.width)
        self.decoder_embed = nn.Linear(c.width, c.width)
        self.decoder_positions = nn.Parameter(torch.empty(1, self.partition.length, c.width))
        self.decoder_blocks = nn.ModuleList(Block(c.width, c.decoder_heads, c) for _ in range(c.decoder_depth))
        self.decoder_norm = RMSNorm(c.width)
        self.head = nn.Linear(c.width, c.latent_dim)
        cut = self.partition
        for name, made in (("entity", cut.entity), ("mask", cut.mask()), ("context_mask", cut.context_mask())):
            self.register_buffer(name, made, persistent=False)
        for name, heads in (("encoder", c.encoder_heads), ("decoder", c.decoder_heads)):
            angles = grid_angles(self.partition.rows, self.partition.columns, c.width // heads)
            self.register_buffer(f"{name}_angles", torch.stack(angles), persistent=False)
        self.info = GeneratorInfo(
            system="xar",
            paper="arXiv:2502.20388",
            tokenizer=c.tokenizer,
            shape=(c.latent_dim, c.grid, c.grid),
            classes=c.class_names or tuple(map(str, range(c.num_classes))),
        )
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights as published."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_embedding.weight, self.encoder_positions, self.decoder_positions):
            nn.init.normal_(table, std=0.02)

    @property
    def blocks(self) -> list[Block]:
        return [*self.encoder_blocks, *self.decoder_blocks]

    @property
    def no_class(self) -> int:
        """Label that means none."""
        return self.config.num_classes

    def condition(self, labels: Tensor, ids: Tensor) -> Tensor:
        """Labels (...) and time ids (...), which broadcast, to conditions (..., D)."""
        return self.class_embedding(labels) + self.time_embedding(ids)

    def forward(self, tokens: Tensor, labels: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """All entities at once: noisy tokens (B, L, C), labels (B,) and times (B, E) to velocities (B, L, C).

        context: clean tokens (B, L, C) that later entities see instead of the noisy ones, as when sampling.
        """
        lengths, span, mask = (
            self.partition.lengths,
            torch.arange(self.partition.length, device=tokens.device),
            self.mask,
        )
        if context is not None:
            tokens, t = torch.cat([context, tokens], dim=1), torch.cat([torch.zeros_like(t), t], dim=1)
            lengths, span, mask = 2 * lengths, span.repeat(2), self.context_mask
        condition = Condition.of_entities(self.condition(labels[:, None], time_ids(t)), lengths)
        return self.network(tokens, condition, span, mask)[:, -self.partition.length :]

    def network(self, tokens: Tensor, condition: Condition, span, mask=None, cache=None, output=True) -> Tensor | None:
        """Tokens (R, n, C) to velocities (R, n, C).

        span: their positions in the sequence, a slice or (n,) int64; mask: (n, m) bool, True where a token looks;
        cache: what earlier tokens left, (block number, keys, values) -> keys, values; output=False: only fill it.
        """
        x = self.embed_norm(self.embed(tokens) + self.encoder_positions[:, span])
        x = x.unflatten(1, (condition.groups, -1))
        angles = turns(*self.encoder_angles[:, span])
        for number, block in enumerate(self.blocks):
            if number == self.config.encoder_depth:
                positions = self.decoder_positions[:, span].unflatten(1, (condition.groups, -1))
                x = self.decoder_embed(self.encoder_norm(x)) + positions
                angles = turns(*self.decoder_angles[:, span])
            remember = None if cache is None else functools.partial(cache, number)
            made = block.modulation_of(condition.values) if condition.made is None else condition.made[number]
            x = block(x, condition.spread(made), angles, mask, remember)
        return self.head(self.decoder_norm(x)).flatten(1, 2) if output else None

    def check_settings(self, num_steps: int | None, guidance: float | None, sampler: str) -> None:
        """Raise ZooError for settings of `sample` that it does not take."""
        if num_steps is not None:
            check_steps(num_steps, least=2)
        if guidance is not None:
            expect_number("guidance", guidance, 0)
        if not isinstance(sampler, str) or sampler not in SAMPLERS:
            raise ZooError(f"sampler must be one of {', '.join(SAMPLERS)}, got {shortened(sampler)}.")

    def generate(self, labels: Tensor, **arguments) -> Tokens:
        """Tokens that the tokenizer decodes, for labels (B,) in 0..num_classes; others: of `sample`."""
        latents = self.sample(labels, **arguments)
        return Tokens(latents={"image": to_tokens(latents)}, grid=tuple(latents.shape[2:]))

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        num_steps: int | None = None,
        guidance: float | None = None,
        sampler: str = "sde",
        start: Sequence[Tensor] | None = None,
        noises: Sequence[Sequence[Tensor]] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Scaled latents (B, C, g, g) for labels (B,) in 0..num_classes, the last being "no class".

        Args:
            num_steps: network calls for each entity, at least 2.
            guidance: of the last entity; it rises in a line from 1 at the first. 1 and less: none.
            sampler: "sde" (Euler-Maruyama, published), "euler" or "heun" (deterministic).
            start: of each entity (B, n, C), noises: of each entity and step but the last; drawn when left out.
            generator: of what is drawn, on any device; a list has one for each row, so that an image does not depend on
                its batch.
        """
        self.check_settings(num_steps, guidance, sampler)
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64 or not len(labels):
            raise ZooError(f"labels are integers, int64 (B,), one for each image, got {shortened(labels)}.")
        if not 0 <= labels.min() <= labels.max() <= self.no_class:
            raise ZooError(f"labels are integers (B,) from 0 to {self.no_class} (no class), got {shortened(labels)}.")
        drawing = generator if isinstance(generator, (list, tuple)) else [generator] * len(labels)
        if len(drawing) != len(labels) or not all(one is None or isinstance(one, torch.Generator) for one in drawing):
            raise ZooError(f"generator is a torch.Generator, or a list of {len(labels)}, got {shortened(generator)}.")
        c, lengths = self.config, self.partition.lengths
        steps = c.num_steps if num_steps is None else num_steps
        scale = c.guidance if guidance is None else guidance
        batch, guided = len(labels), scale > 1
        distinct, index = torch.cat([labels, labels.new_tensor([self.no_class])]).unique(return_inverse=True)
        rows = torch.cat([index[:-1], index[-1:].expand(batch)]) if guided else index[:-1]
        times, solve = SAMPLERS[sampler](steps)
        conditions = self._conditions(distinct, times)
        cache = Cache(len(rows), self.partition.length, self.blocks, self.encoder_positions)

        def draw(shape, dtype):
            if isinstance(generator, (list, tuple)):
                one = [torch.randn(shape[1:], dtype=dtype, device=g.device, generator=g) for g in generator]
                return torch.stack(one).to(labels.device)
            device = generator.device if generator else labels.device
            return torch.randn(shape, dtype=dtype, device=device, generator=generator).to(labels.device)

        finished = []
        for s, (begin, length) in enumerate(zip(self.partition.starts, lengths, strict=True)):
            weight = linear_scale(scale, s, len(lengths))
            used = rows if weight > 1 else rows[:batch]
            if s:  # what was finished is context: clean, at time 0
                self._call(finished[-1], 0.0, conditions, rows, begin - lengths[s - 1], cache, output=False)

            def velocity(x: Tensor, t: float, used=used, weight=weight, begin=begin) -> Tensor:
                v = self._call(x, t, conditions, used, begin, cache)
                return guide(v[:batch], v[batch:], weight) if len(used) > batch else v

            shape = (batch, length, c.latent_dim)
            x = (draw(shape, torch.float32) if start is None else start[s]).double()
            if sampler == "sde":
                drawn = (draw(shape, torch.float64) for _ in range(steps - 1)) if noises is None else noises[s]
                x = solve(velocity, x, times, drawn)
            else:
                x = solve(velocity, x, times)
            finished.append(x.to(self.encoder_positions.dtype))
        return self.partition.to_grid(torch.cat(finished, dim=1))

    def _conditions(self, labels: Tensor, times: Sequence[float]) -> Callable[[float, Tensor], Condition]:
        """Conditions of rows at a time, computed for all times and distinct labels at once, before the first step."""
        times = [0.0, *times]
        ids = time_ids(torch.tensor(times)).to(labels.device)
        values = self.condition(labels, ids[:, None])  # (times, labels, D)
        few = len(labels) <= FEW_LABELS
        made = [block.modulation_of(values) for block in self.blocks] if few else None
        place = {t: i for i, t in enumerate(times)}

        def at(t: float, rows: Tensor) -> Condition:
            i = place[t]
            return Condition.of_rows(values[i], rows, [one[i] for one in made] if few else None)

        return at

    def _call(self, x, t, conditions, rows, begin, cache, output=True):
        """One entity at one time for all rows, the conditional ones first."""
        dtype = self.encoder_positions.dtype
        tokens = x.to(dtype).repeat(len(rows) // len(x), 1, 1)
        condition = conditions(t, rows)
        span = slice(begin, begin + x.shape[1])
        out = self.network(tokens, condition, span, None, lambda n, k, v: cache.update(n, k, v, begin), output)
        return None if out is None else out.double()


def sde_times(num_steps: int) -> list[float]:
    """num_steps times from 1 to 0.04, then 0."""
    return [*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]


def ode_times(num_steps: int) -> list[float]:
    """num_steps + 1 times from 1 to 0."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()


SAMPLERS = {
    "sde": lambda steps: (sde_times(steps), euler_maruyama),
    "euler": lambda steps: (ode_times(steps), euler),
    "heun": lambda steps: (ode_times(steps), heun),
}


def check_space(generator: XARGenerator, tokenizer: Tokenizer) -> None:
    """Raise ZooError unless the generator's latents are those of the tokenizer."""
    info, (channels, rows, columns) = tokenizer.info, generator.info.shape
    if info.kind != "continuous":
        raise ZooError(f"{generator.info.name} generates continuous latents, and {info.name} has discrete tokens.")
    width, count = info.latent_dims[info.streams[0]], info.max_tokens
    if (width, count) != (channels, rows * columns):
        raise ZooError(
            f"{generator.info.name} generates {rows} x {columns} latents of {channels} values, and {info.name} has "
            f"{count} of {width}; set generator.grid and generator.latent_dim."
        )


NO_LICENCE = "none stated by the authors (all rights reserved)"

PRESETS = {
    name: Preset(
        XARGenerator,
        XARConfig(
            width=width,
            encoder_depth=depth,
            decoder_depth=depth,
            encoder_heads=heads,
            decoder_heads=heads,
            num_steps=steps,
            guidance=guidance,
        ),
        f"published {name}: 256 x 256 images of ImageNet's classes in 4 cells of kl-f16",
        Weights(f"hf://OliverRen/xAR/xAR-{name[-1].upper()}.pth"),
        NO_LICENCE,
    )
    for name, width, depth, heads, steps, guidance in (
        ("xar-b", 768, 8, 12, 40, 2.7),
        ("xar-l", 1024, 16, 16, 50, 2.3),
        ("xar-h", 1280, 20, 16, 50, 2.2),
    )
} | {
    "xar-tiny": Preset(
        XARGenerator,
        XARConfig(
            tokenizer="kl-tiny",
            grid=8,
            latent_dim=8,
            num_classes=8,
            width=192,
            encoder_depth=3,
            encoder_heads=6,
            decoder_depth=3,
            decoder_heads=6,
            entity_size=4,
            scales=(1, 2, 4, 8),
            class_names=("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
            num_steps=25,
            guidance=2.0,
        ),
        "small generator trained on the embedded scenes: 64 x 64 images by the colour that covers most",
        Weights("xar-tiny.safetensors", "baf8195fa89dce095480fdeb8df8829c616072c2066ea03be421178dcb568cea"),
    )
}
