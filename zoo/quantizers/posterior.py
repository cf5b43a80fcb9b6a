"""The diagonal Gaussian posterior of a variational autoencoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.nn.precision import wide


class GaussianPosterior(NamedTuple):
    """q(z | x) = N(mean, exp(logvar)) per element (Kingma & Welling 2013)."""

    mean: Tensor
    """(B, D, ...)"""
    logvar: Tensor
    """(B, D, ...), within -30..20."""

    @classmethod
    def from_moments(cls, moments: Tensor) -> GaussianPosterior:
        """moments (B, 2 D, ...): means, then log variances."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30, 20))

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + exp(logvar / 2) * noise; noise: standard normal of the shape of the mean, drawn when left out."""
        return self.mean + (self.logvar / 2).exp() * (torch.randn_like(self.mean) if noise is None else noise)

    def kl(self) -> Tensor:
        """(B,): KL(q || N(0, 1)) in nats, summed over elements, in float32: variances go beyond float16."""
        mean, logvar = wide(self.mean), wide(self.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
