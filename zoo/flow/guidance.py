"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + scale (c - u), of velocities, scores or predictions alike; 1 gives c."""
    return unconditional + scale * (conditional - unconditional)


def guide_twice(
    conditional: Tensor, partial: Tensor, unconditional: Tensor, scale: float, partial_scale: float
) -> Tensor:
    """u + partial_scale (p - u) + scale (c - p), p knowing a part of the condition (arXiv 2211.09800, section 3.2)."""
    return guide(partial, unconditional, partial_scale) + scale * (conditional - partial)


def renormalize(guided: Tensor, conditional: Tensor, eps: float = 1e-8) -> Tensor:
    """The guided vectors (..., D), shortened to the length of the conditional ones where they are longer.

    Each is multiplied by clamp(|c| / |g| + eps, 0, 1); an all-zero one stays zero.
    """
    lengths = [torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (conditional, guided)]
    return guided * (lengths[0] / lengths[1].clamp(min=torch.finfo(guided.dtype).tiny) + eps).clamp(0, 1)


def linear_scale(scale: float, step: int, num_steps: int) -> float:
    """1 at step 0, rising in a line to `scale` at the last of num_steps steps; a step alone has `scale`."""
    return 1 + (scale - 1) * (step / (num_steps - 1) if num_steps > 1 else 1.0)
