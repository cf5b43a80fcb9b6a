"""Vector quantisation whose codes are running means of the vectors they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.distributed import gather_rows, sum_over_ranks
from zoo.errors import ZooError
from zoo.quantizers.search import nearest_code


class Quantized(NamedTuple):
    """What a quantizer gives."""

    quantized: Tensor
    """(..., D): codes, with the gradient of the vectors (straight-through)."""
    ids: Tensor
    """(...) int64."""
    loss: Tensor
    """Scalar."""
    perplexity: Tensor
    """Scalar: exp of the entropy of this batch's codes over all ranks, 1 to K."""


class EMAQuantizer(nn.Module):
    """VQ-VAE quantizer with exponential moving averages (van den Oord et al. 2017, appendix A.1).

    A batch is quantised with the codes as they are; in training mode they are then moved: N <- g N + (1-g) counts,
    smoothed to (N + eps) / (sum N + K eps) * sum N (the smoothed value is what is kept), m <- g m + (1-g) sums, code =
    m / N. Counts and sums are taken over all ranks, so that N ranks with batches of B are one rank with N * B.

    Args:
        num_codes, dim: K and D.
        decay: g.
        commitment: weight of mean((sg(code) - z)^2), the only loss.
        init: "published": codes and sums drawn apart from each other, counts 0, as in the code that circulates, where
            the first batch makes unused codes huge; "data": codes are vectors of the first batch in training mode.
        restart_below: codes whose count falls below this become vectors of the current batch; 0: never.
        eps: of the smoothing.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float = 0.99,
        commitment: float = 0.25,
        init: str = "published",
        restart_below: float = 0.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        if init not in ("published", "data"):
            raise ZooError(f"EMAQuantizer.init must be 'published' or 'data', got {init!r}.")
        self.decay, self.commitment, self.eps = decay, commitment, eps
        self.init, self.restart_below = init, restart_below
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_sum", torch.randn(num_codes, dim))

    def forward(self, z: Tensor) -> Quantized:
        """z (..., D)."""
        vectors = z.detach().float().flatten(0, -2)
        if self.training and self.init == "data":
            self._start_from(vectors)
        ids = self.encode(z)
        codes = self.codebook[ids].to(z.dtype)
        loss = self.commitment * F.mse_loss(z, codes)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            counts, sums = self._statistics(vectors, ids.flatten())
            if self.training:
                self._update(counts, sums, vectors)
        return Quantized(z + (codes - z).detach(), ids, loss, perplexity(counts))

    def encode(self, z: Tensor) -> Tensor:
        """z (..., D) -> ids (...) int64, without moving anything."""
        return nearest_code(z, self.codebook)

    def _statistics(self, vectors: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (K,) and sums (K, D) of the vectors of each code over all ranks; vectors not finite are left out."""
        finite = vectors.isfinite().all(1)
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, finite.to(self.cluster_size.dtype))
        sums = torch.zeros_like(self.embed_sum).index_add_(0, ids, vectors.where(finite[:, None], 0))
        return tuple(sum_over_ranks(counts, sums))

    def _update(self, counts: Tensor, sums: Tensor, vectors: Tensor) -> None:
        size = self.cluster_size.lerp(counts, 1 - self.decay)
        total = size.sum()
        size = (size + self.eps) / (total + len(size) * self.eps) * total
        self.embed_sum.lerp_(sums, 1 - self.decay)
        if self.restart_below:
            dead = size < self.restart_below
            size = size.where(~dead, 1.0)
            self.embed_sum.copy_(self.embed_sum.where(~dead[:, None], self._draw(vectors)))
        self.cluster_size.copy_(size)
        self.codebook.copy_(self.embed_sum / size[:, None])

    def _start_from(self, vectors: Tensor) -> None:
        """Codes from vectors of the first batch. No code was counted before that; nothing is read from the device."""
        fresh = (self.cluster_size == 0).all()
        drawn = self._draw(vectors)
        self.codebook.copy_(self.codebook.where(~fresh, drawn))
        self.embed_sum.copy_(self.embed_sum.where(~fresh, drawn))
        self.cluster_size.copy_(self.cluster_size.where(~fresh, 1.0))

    def _draw(self, vectors: Tensor) -> Tensor:
        """K vectors of the batches of all ranks, the same on every rank: evenly spaced, which needs no random numbers.

        Each rank offers its share. Vectors that are not finite are replaced by the codes as they are.
        """
        everyone = gather_rows(vectors[self._spread(len(vectors), min(len(vectors), len(self.codebook)), vectors)])
        drawn = everyone[self._spread(len(everyone), len(self.codebook), vectors)]
        return drawn.where(drawn.isfinite().all(1, keepdim=True), self.codebook)

    @staticmethod
    def _spread(total: int, count: int, like: Tensor) -> Tensor:
        return torch.arange(count, device=like.device) * total // count


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of codes used `counts` (K,) times: exp(-sum p log(p + 1e-10)), p = counts / sum."""
    share = counts / counts.sum()
    return (-(share * (share + 1e-10).log()).sum()).exp()
