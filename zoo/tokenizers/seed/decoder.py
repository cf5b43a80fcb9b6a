"""Pixels of one image embedding: the small counterpart of the unCLIP model (arXiv 2204.06125) behind SEED.

SEED's tokens decode to an estimate of the embedding that a frozen image tower gives the image, and a frozen unCLIP
model makes pixels of it. Here that model is a diffusion transformer (DiT, arXiv 2212.09748) that flows from noise to
the latents of a continuous tokenizer of the zoo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import registry
from zoo.errors import ZooError, expect_number
from zoo.flow import check_steps, euler, falling, guide, interpolate
from zoo.nn.embedding import TimeEmbedding, sinusoids
from zoo.nn.transformer import Attention, Mlp
from zoo.tokenizer import Preset, Tokenizer, Tokens, Weights

EPS = 1e-6
"""Of every LayerNorm."""

TIMES = 1000
"""The network reads TIMES * t, and TIMES * noise level."""


@dataclass(frozen=True)
class FlowDecoderConfig:
    """Sizes of the decoder; the defaults are those of seed-tiny-decoder."""

    tokenizer: str = "kl-tiny"
    """Name of the continuous tokenizer whose latents it makes."""
    encoder: str = "siglip-tiny"
    """Name of the encoder whose embeddings of images it reads: pooled, and not normalised."""
    image_size: int = 64
    """Side of the images that the tokenizer makes of the latents."""
    grid: int = 8
    """Side of the grid of latents."""
    latent_dim: int = 8
    embed_dim: int = 128
    """Width of the embedding."""
    width: int = 192
    depth: int = 6
    num_heads: int = 6
    mlp_ratio: int = 4
    modulation_rank: int = 64
    """Width through which a block's scales, shifts and gates are made of the condition. At full width they would be a
    third of all parameters (AdaLN-LoRA of Cosmos, arXiv 2501.03575)."""
    condition_tokens: int = 4
    """Tokens made of the embedding that stand before the latents, as in unCLIP; 0: it only modulates."""
    condition_dropout: float = 0.1
    """Share of embeddings that are left out in training, for guidance."""
    num_steps: int = 25
    """Network calls for an image, unless others are asked for; guidance makes each one of two rows."""
    guidance: float = 2.0

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name == "condition_tokens" else 1
            if type(value) is int and value < least:
                raise ZooError(f"FlowDecoderConfig.{name} must be at least {least}, got {value}.")
        if self.width % self.num_heads or self.width % 4:
            raise ZooError(
                f"FlowDecoderConfig.width {self.width} must be a multiple of num_heads {self.num_heads}, and of 4 for "
                "the positions."
            )
        if not 0 <= self.condition_dropout <= 1:
            raise ZooError(f"FlowDecoderConfig.condition_dropout is a share from 0 to 1, got {self.condition_dropout}.")
        if not 0 <= self.guidance < float("inf"):
            raise ZooError(f"FlowDecoderConfig.guidance must not be below 0, got {self.guidance}.")


@dataclass(frozen=True)
class DecoderInfo:
    """What a caller has to know about a decoder before using it."""

    system: str
    paper: str
    encoder: str
    """Name of the encoder whose embeddings it reads."""
    embed_dim: int
    """Width of these."""
    tokenizer: str
    """Name of the tokenizer that makes pixels of the latents."""
    image_size: int
    """Side in pixels of the square images that come out."""
    name: str = "custom"
    licence: str = "Apache-2.0"


class DiTBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, c: FlowDecoderConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, EPS, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Attention(c.width, c.num_heads), Mlp(c.width, c.mlp_ratio * c.width)
        self.modulation = nn.Sequential(
            nn.Linear(c.width, c.modulation_rank, bias=False), nn.Linear(c.modulation_rank, 6 * c.width)
        )

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h (B, N, D), condition (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = torch.addcmul(h, gate1, self.attn(torch.addcmul(shift1, self.norm1(h), 1 + scale1)))
        return torch.addcmul(h, gate2, self.mlp(torch.addcmul(shift2, self.norm2(h), 1 + scale2)))


class DiTOutput(nn.Module):
    """Norm, scaled and shifted by the condition, then a linear layer."""

    def __init__(self, c: FlowDecoderConfig):
        super().__init__()
        self.norm = nn.LayerNorm(c.width, EPS, elementwise_affine=False)
        self.modulation, self.linear = nn.Linear(c.width, 2 * c.width), nn.Linear(c.width, c.latent_dim)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm(h), 1 + scale))


class FlowDecoder(nn.Module):
    """Makes images of embeddings (B, E), through the latents of a tokenizer.

    As in unCLIP the network reads the embedding whitened and mixed with noise at a level that it is told, so that it
    serves with embeddings that are not exact: (1 - s) z + s e at noise level s. `decode` and `sample` are the public,
    checked and gradient-free side; training goes through forward.
    """

    Config = FlowDecoderConfig

    def __init__(self, config: FlowDecoderConfig):
        super().__init__()
        c = self.config = config
        self.time_embed, self.level_embed = TimeEmbedding(c.width), TimeEmbedding(c.width)
        self.embed_proj = nn.Sequential(nn.Linear(c.embed_dim, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.token_proj = nn.Linear(c.embed_dim, c.condition_tokens * c.width) if c.condition_tokens else None
        self.no_embedding = nn.Parameter(torch.zeros(c.embed_dim))
        self.input_proj = nn.Linear(c.latent_dim, c.width)
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.depth))
        self.output = DiTOutput(c)
        self.register_buffer("positions", grid_positions(c.grid, c.width), persistent=False)
        self.register_buffer("mean", torch.zeros(c.embed_dim))
        self.register_buffer("std", torch.ones(c.embed_dim))
        self._loaded: list[Tokenizer] = []  # no submodule: its weights are in a file of their own
        self.info = DecoderInfo(
            system="seed",
            paper="arXiv:2307.08041",
            encoder=c.encoder,
            embed_dim=c.embed_dim,
            tokenizer=c.tokenizer,
            image_size=c.image_size,
        )
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights as in DiT: every block starts as the identity, and the network as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embed in (self.time_embed, self.level_embed):
            for layer in (embed.mlp[0], embed.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation[1] for block in self.blocks), self.output.modulation, self.output.linear):
            nn.init.zeros_(layer.weight)

    @property
    def embed_shape(self) -> tuple[int, ...]:
        """Of an embedding, without the batch."""
        return (self.config.embed_dim,)

    @property
    def device(self) -> torch.device:
        return self.no_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.no_embedding.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """Makes pixels of the latents; loaded by its name when it is first asked for."""
        if not self._loaded:
            made = registry.tokenizers.load(self.config.tokenizer)
            check_space(self, made)
            self._loaded.append(made)
        return self._loaded[0].to(self.device, self.dtype)

    def whiten(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, E) to what the network reads: mean 0 and standard deviation 1 over the training images."""
        return (embeddings - self.mean) / self.std

    def forward(self, x: Tensor, t: Tensor, z: Tensor, levels: Tensor) -> Tensor:
        """Velocities (B, N, C), as in zoo.flow.

        Args:
            x: noisy latents (B, N, C) in raster order.
            t: times (B,) in 0..1, 1 being noise.
            z: whitened embeddings (B, E), mixed with noise at their levels, or `no_embedding`.
            levels: (B,) in 0..1; 0 for no embedding.
        """
        h = self.input_proj(x) + self.positions
        if self.token_proj is not None:
            h = torch.cat([self.token_proj(z).unflatten(1, (-1, h.shape[2])), h], dim=1)
        condition = F.silu(self.time_embed(TIMES * t) + self.level_embed(TIMES * levels) + self.embed_proj(z))
        for block in self.blocks:
            h = block(h, condition)
        return self.output(h[:, -x.shape[1] :], condition)

    @torch.no_grad()
    def decode(self, embeddings: Tensor, **settings) -> Tensor:
        """Embeddings (B, E) to images (B, 3, H, W) float32 in [0, 1]; settings: of `sample`."""
        return self.tokenizer.decode(self.sample(embeddings, **settings).to(self.dtype)).float()

    @torch.no_grad()
    def sample(
        self,
        embeddings: Tensor,
        num_steps: int | None = None,
        guidance: float | None = None,
        noise_level: float = 0.0,
        generator: Sequence[torch.Generator] | None = None,
        seed: int = 0,
    ) -> Tokens:
        """Tokens that the tokenizer decodes, for embeddings (B, E) as the encoder gives them before normalisation.

        Args:
            num_steps: network calls; default: config.num_steps.
            guidance: v_u + guidance (v - v_u), u knowing no embedding; 1: none. Default: config.guidance.
            noise_level: in 0..1, how much noise is mixed into the embeddings, which hides their errors.
            generator: one for each image, of all that is drawn for it. Without them every image is drawn the same
                numbers, from `seed` on the CPU, as SEED's published code starts all its images from one noise.

        Raises:
            ZooError: embeddings of another form or with NaN, or settings that are not possible.
        """
        c = self.config
        steps = c.num_steps if num_steps is None else num_steps
        scale = c.guidance if guidance is None else guidance
        self._check(embeddings, steps, scale, noise_level, generator, seed)
        z = self.whiten(embeddings.to(self.device, self.mean.dtype)).to(self.dtype)
        count = len(z)
        draws = [torch.Generator().manual_seed(seed)] if generator is None else generator

        def draw(*shape: int) -> Tensor:
            rows = torch.stack([torch.randn(shape, device=one.device, generator=one).to(self.device) for one in draws])
            return rows.expand(count, *shape)

        x = draw(c.grid**2, c.latent_dim)
        if noise_level > 0:
            z = interpolate(z, draw(c.embed_dim).to(z.dtype), noise_level)
        levels = torch.full((count,), float(noise_level), device=self.device)
        guided = scale != 1
        if guided:
            z, levels = torch.cat([z, self.no_embedding.expand_as(z)]), torch.cat([levels, torch.zeros_like(levels)])

        def field(x: Tensor, t: float) -> Tensor:
            rows = x.to(self.dtype).repeat(2, 1, 1) if guided else x.to(self.dtype)
            v = self(rows, torch.full((len(z),), t, device=self.device), z, levels).float()
            return guide(v[:count], v[count:], scale) if guided else v

        latents = euler(field, x, falling(steps))
        return Tokens(latents={"image": latents}, grid=(c.grid, c.grid))

    def _check(self, embeddings, steps, guidance, noise_level, generator, seed) -> None:
        want = f"{self.info.name} takes float embeddings (B, {self.config.embed_dim}) of {self.info.encoder}"
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            got = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ZooError(f"{want}, got {got}.")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.config.embed_dim or not len(embeddings):
            raise ZooError(f"{want}, got shape {tuple(embeddings.shape)}.")
        if not embeddings.isfinite().all():
            raise ZooError(f"{want}, got values that are not finite.")
        check_steps(steps)
        expect_number("guidance", guidance, 0)
        if not _is_number(noise_level) or not 0 <= noise_level <= 1:
            raise ZooError(f"noise_level must be from 0 to 1, got {noise_level!r}.")
        if type(seed) is not int or seed < 0:
            raise ZooError(f"seed must be an integer of at least 0, got {seed!r}.")
        if generator is not None and (
            not isinstance(generator, (list, tuple))
            or len(generator) != len(embeddings)
            or not all(isinstance(one, torch.Generator) for one in generator)
        ):
            raise ZooError(f"generator is a list of {len(embeddings)} torch.Generator, one an image, or None.")

    def extra_repr(self) -> str:
        return f"name={self.info.name!r}"


def _is_number(value) -> bool:
    return type(value) in (int, float)


def grid_positions(side: int, width: int) -> Tensor:
    """(side^2, width) sinusoids of a raster: one half of the channels for the row, the other for the column."""
    places = sinusoids(torch.arange(side), width // 2)
    return torch.cat([places.repeat_interleave(side, dim=0), places.repeat(side, 1)], dim=1)


def check_space(decoder: FlowDecoder, tokenizer: Tokenizer) -> None:
    """Raise ZooError unless the decoder's latents are those of the tokenizer."""
    info, c = tokenizer.info, decoder.config
    if info.kind != "continuous":
        raise ZooError(f"{decoder.info.name} makes continuous latents, and {info.name} has discrete tokens.")
    made = info.image_size, info.max_tokens, info.latent_dims.get("image")
    if made != (c.image_size, c.grid**2, c.latent_dim):
        raise ZooError(
            f"{decoder.info.name} makes {c.grid} x {c.grid} latents of {c.latent_dim} values for images of "
            f"{c.image_size} pixels, and {info.name} has {made[1]} of {made[2]} for {made[0]}; set decoder.grid, "
            "decoder.latent_dim and decoder.image_size."
        )


PRESETS = {
    "seed-tiny-decoder": Preset(
        FlowDecoder,
        FlowDecoderConfig(),
        "small unCLIP trained on the embedded scenes: embeddings of siglip-tiny to 64 x 64 images",
        Weights("seed-tiny-decoder.safetensors", "5a7ba9a828a8d1a4adb867174ce309dab739472170c32a130b281e3505ee4130"),
    ),
}
