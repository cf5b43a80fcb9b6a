"""Embeddings of times."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(values: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """(...) to (..., width) float32: cosines, then sines, of the values at frequencies max_period^(-2 i / width)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values[..., None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of a time, then two layers with SiLU between them."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """(...) on the scale 0..1000 to (..., D)."""
        return self.mlp(sinusoids(times, self.frequencies).to(self.mlp[0].weight.dtype))
