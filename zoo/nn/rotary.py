"""Rotary position embeddings (arXiv 2104.09864) on a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_angles(rows: Tensor, columns: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, head_dim) float32 for tokens at rows and columns (L,).

    The first half of a head turns with the row, the second with the column, at the frequencies theta^(-2j / d),
    j = 0..d/2 - 1, d = head_dim / 2, each for two neighbouring channels. head_dim must be a multiple of 4.
    """
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = [positions.float()[:, None] * frequencies.repeat_interleave(2) for positions in (rows, columns)]
    angles = torch.cat(angles, dim=1)
    return angles.cos(), angles.sin()


def turns(cosines: Tensor, sines: Tensor) -> Tensor:
    """What `rotate` multiplies by: (L, head_dim / 2) complex64, from the tables of `grid_angles`."""
    return torch.complex(cosines[:, ::2].float(), sines[:, ::2].float())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x (..., L, head_dim): neighbouring channels (a, b) become (a cos - b sin, b cos + a sin), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
