"""Floating point numbers that are precise enough for what autocast must not touch."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already: a training in 64-true is in float64 throughout."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
