"""The rectified-flow head of Ming-UniVision (arXiv 2510.06590): a language model writes MingTok's latents with it.

Where the convention of zoo.flow has the velocity e - x, from data x to noise e, the published network gives x - e.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError, expect_number
from zoo.flow import check_steps, euler, falling, guide, guide_twice, interpolate, renormalize, velocity
from zoo.nn.embedding import TimeEmbedding
from zoo.nn.transformer import SwiGLU

EPS = 1e-6
"""Of every LayerNorm."""

TIMES = 1000
"""The network reads TIMES * t."""


@dataclass(frozen=True)
class FlowHeadConfig:
    """Sizes of the head; the defaults are those of Ming-UniVision-16B-A3B."""

    latent_dim: int = 32
    hidden_size: int = 2048
    """Width of the language model."""
    feature_dim: int = 1024
    """Width of the tokenizer's semantic features, which the language model reads."""
    condition_dim: int = 3072
    width: int = 3072
    depth: int = 12
    mlp_ratio: int = 4
    projector_depth: int = 2
    """Linear layers between features and language model."""
    num_steps: int = 16
    """Network calls for a latent, unless others are asked for."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ZooError(f"FlowHeadConfig.{name} must be an integer of at least 1, got {value!r}.")


class FlowBlock(nn.Module):
    """Residual SwiGLU, scaled, shifted and gated by the condition (adaLN, arXiv 2212.09748)."""

    def __init__(self, width: int, mlp_ratio: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width, EPS), SwiGLU(width, mlp_ratio * width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


class FlowOutput(nn.Module):
    """Norm without weights, scaled and shifted by the condition, then a linear layer."""

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width, EPS, elementwise_affine=False), nn.Linear(width, latent_dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm(h) * (1 + scale) + shift)


class FlowNetwork(nn.Module):
    """Predicts x - e, data minus noise, from a noisy latent, its time and a condition; each latent by itself."""

    def __init__(self, c: FlowHeadConfig):
        super().__init__()
        self.time_embed = TimeEmbedding(c.width)
        self.cond_embed = nn.Linear(c.condition_dim, c.width)
        self.input_proj = nn.Linear(c.latent_dim, c.width)
        self.blocks = nn.ModuleList(FlowBlock(c.width, c.mlp_ratio) for _ in range(c.depth))
        self.output = FlowOutput(c.width, c.latent_dim)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t (..., C), times (...) in 0..1, 1 being noise, and conditions (..., Z) to (..., C)."""
        condition = self.time_embed(TIMES * t) + self.cond_embed(z)
        h = self.input_proj(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.output(h, condition)


class FlowHead(nn.Module):
    """What stands between a language model and MingTok: hidden states to latents, and features to its inputs."""

    Config = FlowHeadConfig

    def __init__(self, config: FlowHeadConfig):
        super().__init__()
        c = self.config = config
        self.vis_head = nn.Sequential(nn.Linear(c.hidden_size, c.condition_dim), nn.LayerNorm(c.condition_dim, EPS))
        self.net = FlowNetwork(c)
        self.projector = nn.Sequential(nn.Linear(c.feature_dim, c.hidden_size))
        for _ in range(c.projector_depth - 1):
            self.projector.extend([nn.GELU(), nn.Linear(c.hidden_size, c.hidden_size)])
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights as published: the network starts as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.net.time_embed.mlp[0], self.net.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for part in (*self.net.blocks, self.net.output):
            nn.init.zeros_(part.modulation[1].weight)
        nn.init.zeros_(self.net.output.linear.weight)

    def condition(self, hidden: Tensor) -> Tensor:
        """Hidden states of the language model (..., hidden_size) to conditions (..., Z)."""
        return self.vis_head(hidden)

    def project(self, features: Tensor) -> Tensor:
        """Semantic features (..., D), of images read or written, to inputs of the language model (..., hidden_size)."""
        return self.projector(features)

    def velocity(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """e - x as in zoo.flow, for x_t (..., C), times (...) and conditions (..., Z)."""
        return -self.net(x, t, z)

    def loss(
        self,
        z: Tensor,
        latents: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Squared error of the velocity for each latent (...), whose mean is the objective.

        The authors' training is not released; this is the objective that belongs to their sampler.

        Args:
            z: conditions (..., Z).
            latents: normalised latents (..., C).
            t: times (...), uniform in 0..1 when left out.
            noise: (..., C), standard normal when left out.
            generator: of what is drawn.
        """
        shape, device = latents.shape, latents.device
        t = torch.rand(shape[:-1], device=device, generator=generator) if t is None else t
        noise = torch.randn(shape, device=device, generator=generator) if noise is None else noise
        x = interpolate(latents, noise, t)
        return F.mse_loss(self.velocity(x, t, z), velocity(latents, noise), reduction="none").mean(-1)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        unconditional: Tensor | None = None,
        text_unconditional: Tensor | None = None,
        text_scale: float = 3.0,
        image_scale: float = 1.1,
        renorm: bool = False,
        temperature: float = 1.0,
        time_shift: float = 1.0,
        num_steps: int | None = None,
        noise: Tensor | None = None,
        shared_noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised latents (B, C) for conditions (B, Z), guided where there are unconditional ones.

        The defaults are those of the published generation.

        Args:
            z: conditions of B latents.
            unconditional: (B, Z), conditions without the user's turn: v_u + text_scale (v - v_u).
            text_unconditional: (B, Z), conditions with the images of the user's turn and without its text, for editing:
                v_u + image_scale (v_t - v_u) + text_scale (v - v_t). Without it image_scale has no effect.
            renorm: guided velocities are not longer than those of z.
            temperature: factor of the start noise.
            time_shift: above 1 more of the steps are spent near noise, see zoo.flow.shift.
            num_steps: network calls; default: config.num_steps.
            noise: start (B, C), or (1, C) for all; drawn when left out.
            shared_noise: draw one start for all B latents.
            generator: of the draw.

        Raises:
            ZooError: conditions of different shapes, or settings that are not possible.
        """
        steps = self.config.num_steps if num_steps is None else num_steps
        self._check(z, unconditional, text_unconditional, steps, time_shift, temperature)
        conditions = [one for one in (z, unconditional, text_unconditional) if one is not None]
        rows = torch.cat(conditions)

        def field(x: Tensor, t: float) -> Tensor:
            inputs = x.to(z.dtype).repeat(len(conditions), 1)
            times = torch.full((len(rows),), t, device=z.device)
            v = self.velocity(inputs, times, rows).float().chunk(len(conditions))
            if len(v) == 1:
                return v[0]
            if len(v) == 2:
                guided = guide(v[0], v[1], text_scale)
            else:
                guided = guide_twice(v[0], v[2], v[1], text_scale, image_scale)
            return renormalize(guided, v[0]) if renorm else guided

        shape = (len(z), self.config.latent_dim)
        if noise is not None and noise.shape not in (shape, (1, shape[1])):
            raise ZooError(f"noise is {shape}, or (1, {shape[1]}) for all latents, got {tuple(noise.shape)}.")
        if noise is None:
            noise = torch.randn((1, shape[1]) if shared_noise else shape, device=z.device, generator=generator)
        x = temperature * noise.float().expand(shape)
        return euler(field, x, falling(steps, time_shift)).to(z.dtype)

    def _check(self, z, unconditional, text_unconditional, steps, time_shift, temperature) -> None:
        if z.ndim != 2 or z.shape[1] != self.config.condition_dim:
            raise ZooError(f"conditions are (B, {self.config.condition_dim}), got shape {tuple(z.shape)}.")
        for name, other in (("unconditional", unconditional), ("text_unconditional", text_unconditional)):
            if other is not None and other.shape != z.shape:
                raise ZooError(f"{name} is one condition for each of z {tuple(z.shape)}, got {tuple(other.shape)}.")
        if text_unconditional is not None and unconditional is None:
            raise ZooError("text_unconditional= is for guidance beside unconditional=, which is missing.")
        check_steps(steps)
        expect_number("temperature", temperature, 0)
        expect_number("time_shift", time_shift, 0)
        if not time_shift > 0:
            raise ZooError(f"time_shift must be above 0 (1: none), got {time_shift}.")
