"""The straight path between data and noise, and what its velocity says about them.

Times are floats or tensors that broadcast against x after trailing axes are added: (B,) for x (B, ...).
"""

from __future__ import annotations

from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """x_t = (1 - t) x + t e, of the shape of the data."""
    t = _like(t, data)
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """v = e - x, the target of the network."""
    return noise - data


def data_at(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """The data that a velocity points to: x_t - t v."""
    return x - _like(t, x) * v


def score(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """Gradient of the log density of x_t for standard normal noise, t > 0: -((1 - t) v + x_t) / t."""
    t = _like(t, x)
    return -((1 - t) * v + x) / t


def _like(t: float | Tensor, x: Tensor) -> float | Tensor:
    return t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)) if isinstance(t, Tensor) else t
