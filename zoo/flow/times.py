"""Which times a training sees, and how a sampler spaces its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import expect_integer


def logit_normal(
    shape: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """t = sigmoid(mean + std * z), z standard normal (arXiv 2403.03206, equation 19)."""
    return torch.sigmoid(mean + std * torch.randn(tuple(shape), device=device, generator=generator))


def shift(t: Tensor, factor: float) -> Tensor:
    """factor t / (1 + (factor - 1) t): above 1 more steps are near noise (arXiv 2403.03206, equation 23)."""
    return factor * t / (1 + (factor - 1) * t)


def check_steps(num_steps: int, least: int = 1) -> None:
    """Raise ZooError for what is no number of steps; above 100,000 it is a mistake that would take days."""
    expect_integer("num_steps", num_steps, least, 100_000)


def falling(num_steps: int, shift_factor: float = 1.0) -> list[float]:
    """num_steps + 1 times from 1 to 0, evenly spaced and then shifted."""
    return shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift_factor).tolist()
