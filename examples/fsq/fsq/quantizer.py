"""Finite scalar quantization (arXiv 2309.15505): each number is rounded to one of a few values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.precision import wide
from zoo.quantizers.ema import Quantized, code_counts, perplexity


class ScalarQuantizer(nn.Module):
    """Bounds the i-th number of a vector by a tanh and rounds it to one of levels[i] values, with a straight-through
    gradient. Every combination of values is a code, so there is nothing to learn and no loss.

    Args:
        levels: values of each number, at least 2; there are K = prod(levels) codes of D = len(levels) numbers.

    Raises:
        ZooError: there are no levels, or one is below 2.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ZooError(f"levels must be at least 2 values for each number of a code, got {tuple(levels)}.")
        self.num_codes = math.prod(levels)
        places = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """z (..., D), in float32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bounded(wide(z))
            values = bounded.round()
            ids = self.ids_of(values)
            quantized = (bounded + (values - bounded).detach()) / (self.levels // 2)
            counts = code_counts(ids.flatten(), self.num_codes)
        return Quantized(quantized.to(z.dtype), ids, z.new_zeros(()), perplexity(counts), counts)

    def encode(self, z: Tensor) -> Tensor:
        """z (..., D) -> ids (...) int64."""
        return self.ids_of(self.bounded(wide(z)).round())

    def codes(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D) in [-1, 1]: what the decoder reads for them."""
        digits = ids[..., None] // self.places % self.levels
        return digits / (self.levels // 2) - 1

    def bounded(self, z: Tensor) -> Tensor:
        """z (..., D) to numbers that round to -(L // 2) ... (L - 1) // 2, for L levels; 0 stays 0."""
        half, offset = (self.levels - 1) / 2, 0.5 * (self.levels % 2 == 0)
        return half * torch.tanh(z + torch.atanh(offset / half)) - offset

    def ids_of(self, values: Tensor) -> Tensor:
        """Rounded values (..., D) to ids (...): the digits of a number, the first the lowest. NaN counts as 0."""
        return ((values.nan_to_num().long() + self.levels // 2) * self.places).sum(-1)
