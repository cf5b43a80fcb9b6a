"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + scale (c - u), of velocities, scores or predictions alike; 1 gives c."""
    return unconditional + scale * (conditional - unconditional)


def linear_scale(scale: float, step: int, num_steps: int) -> float:
    """1 at step 0, rising in a line to `scale` at the last of num_steps steps; a step alone has `scale`."""
    return 1 + (scale - 1) * (step / (num_steps - 1) if num_steps > 1 else 1.0)
