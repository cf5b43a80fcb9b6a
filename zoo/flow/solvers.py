"""From noise to data along a velocity field v(x, t).

x: (...) of any shape; velocity: function (x, t) -> tensor of the shape of x, t a float; times: falling from the time of
the start to that of the end, one network call (Heun: two) per interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.flow.paths import score

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x <- x + dt v(x, t); first order."""
    for t, following in pairwise(times):
        x = x + (following - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x <- x + dt (v(x, t) + v(x + dt v(x, t), t + dt)) / 2; second order."""
    for t, following in pairwise(times):
        dt = following - t
        first = velocity(x, t)
        x = x + dt / 2 * (first + velocity(x + dt * first, following))
    return x


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    noises: Iterable[Tensor] | None = None,
    diffusion: Callable[[float], float] = lambda t: 2 * t,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The reverse-time SDE with the marginals of the flow (arXiv 2401.08740, equation 5): with w the diffusion,

        x <- x + dt (v - w(t) / 2 * score) + sqrt(w(t) |dt|) e,

    and no noise in the last step, which ends in data. First order in distribution. noises: e of each step but the last,
    drawn when left out.
    """
    steps, noises = len(times) - 1, None if noises is None else iter(noises)
    for i, (t, following) in enumerate(pairwise(times)):
        dt, w = following - t, diffusion(t)
        e = None
        if i < steps - 1:  # drawn before the network is called
            e = (
                torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
                if noises is None
                else next(noises)
            )
        v = velocity(x, t)
        x = x + dt * (v - w / 2 * score(x, v, t))
        if e is not None:
            x = x + math.sqrt(w * abs(dt)) * e
    return x


def adaptive(
    velocity: Velocity, x: Tensor, start: float = 1.0, end: float = 0.0, method: str = "dopri5", **options
) -> Tensor:
    """An adaptive solver of torchdiffeq (the extra `ode`), with its options rtol, atol, ...

    Raises ZooError when torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ZooError(
            "adaptive solvers need torchdiffeq; install it with pip install 'tokenizer-zoo[ode]'."
        ) from error
    span = torch.tensor([start, end], dtype=x.dtype, device=x.device)
    return odeint(lambda t, x: velocity(x, float(t)), x, span, method=method, **options)[-1]
