"""Vector quantisation whose codes are running means of the vectors they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.distributed import from_first_rank, rows_of_all_ranks, sum_over_ranks, world_size
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
    counts: Tensor
    """(K,) float32: how often each code was used over all ranks."""


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
        restart_below: codes whose count N falls below this become random vectors of the current batch, with a count
            of 1; 0: never.
        eps: of the smoothing.
        normalize: vectors and means are divided by their length; what comes out are unit vectors.
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
        normalize: bool = False,
    ):
        super().__init__()
        if init not in ("published", "data"):
            raise ZooError(f"EMAQuantizer.init must be 'published' or 'data', got {init!r}.")
        self.decay, self.commitment, self.eps, self.normalize = decay, commitment, eps, normalize
        self.init, self.restart_below = init, restart_below
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_sum", torch.randn(num_codes, dim))

    def forward(self, z: Tensor) -> Quantized:
        """z (..., D); under several ranks every rank has as many vectors."""
        vectors = self._scaled(z.detach().float().reshape(-1, z.shape[-1]))
        drawn = None
        if self.training and (self.init == "data" or self.restart_below):
            drawn = self._draw(vectors)
            if self.init == "data":
                self._start_from(drawn)
        ids = self.encode(z)
        with torch.autocast(z.device.type, enabled=False):
            exact, codes = self._scaled(z.float()), self.codebook[ids].float()
            loss = self.commitment * F.mse_loss(exact, codes)
            quantized = (exact + (codes - exact).detach()).to(z.dtype)
            with torch.no_grad():
                counts, sums = code_statistics(vectors, ids.flatten(), len(self.codebook))
                if self.training:
                    self._update(counts, sums, drawn)
        return Quantized(quantized, ids, loss, perplexity(counts), counts)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each codebook."""
        return (len(self.codebook),)

    def encode(self, z: Tensor) -> Tensor:
        """z (..., D) -> ids (...) int64, without moving anything."""
        return nearest_code(self._scaled(z.float()), self.codebook)

    def codes(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D): what the decoder reads for them."""
        return self.codebook[ids]

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def _update(self, counts: Tensor, sums: Tensor, drawn: Tensor | None) -> None:
        size = self.cluster_size.float().lerp(counts, 1 - self.decay)
        total = size.sum()
        size = (size + self.eps) / (total + len(size) * self.eps) * total
        embed_sum = self.embed_sum.float().lerp(sums, 1 - self.decay)
        if self.restart_below:
            dead = size < self.restart_below
            size = size.where(~dead, 1.0)
            embed_sum = embed_sum.where(~dead[:, None], drawn)
        # in place: whoever holds the buffers (DDP, an average of weights) goes on seeing them
        self.cluster_size.copy_(size)
        self.embed_sum.copy_(embed_sum)
        # nothing was counted yet when a very first batch has no finite vector
        self.codebook.copy_(self._scaled(embed_sum / size[:, None]).where(total > 0, self.codebook.float()))

    @torch.no_grad()
    def _start_from(self, drawn: Tensor) -> None:
        """Codes from vectors of the first batch. No code was counted before that; nothing is read from the device."""
        fresh = (self.cluster_size == 0).all()
        self.codebook.copy_(drawn.where(fresh, self.codebook.float()))
        self.embed_sum.copy_(drawn.where(fresh, self.embed_sum.float()))
        self.cluster_size.copy_(self.cluster_size.where(~fresh, 1.0))

    @torch.no_grad()
    def _draw(self, vectors: Tensor) -> Tensor:
        """K random vectors of the batches of all ranks; all of them, some several times, when there are fewer."""
        total = len(vectors) * world_size()
        order = torch.randperm(total, device=vectors.device)
        index = order[torch.arange(len(self.codebook), device=vectors.device) % total]
        return drawn_over_ranks(vectors, index, self.codebook)


def drawn_over_ranks(vectors: Tensor, index: Tensor, codebook: Tensor) -> Tensor:
    """Vectors (M, D) of all ranks, one after the other, at the index (K,) of rank 0: (K, D) on every rank.

    A vector that is not finite is replaced by the code (K, D) as it is.
    """
    drawn = rows_of_all_ranks(vectors, from_first_rank(index))
    return drawn.where(drawn.isfinite().all(1, keepdim=True), codebook.float())


def code_statistics(vectors: Tensor, ids: Tensor, num_codes: int) -> list[Tensor]:
    """How often each code was used over all ranks (K,), and the sum of its vectors (K, D), in float32.

    vectors (M, D) with their ids (M,); vectors that are not finite are left out.
    """
    finite = vectors.isfinite().all(1)
    counts = vectors.new_zeros(num_codes).index_add_(0, ids, finite.to(vectors.dtype))
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, ids, vectors.where(finite[:, None], 0))
    return sum_over_ranks(counts, sums)


def code_counts(ids: Tensor, num_codes: int) -> Tensor:
    """How often each code was used over all ranks, (M,) ids -> (K,) float32."""
    ones = torch.ones(ids.numel(), device=ids.device)
    return sum_over_ranks(ones.new_zeros(num_codes).index_add_(0, ids, ones))[0]


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of codes used `counts` (K,) times: exp(-sum p log(p + 1e-10)), p = counts / sum; 1 if none."""
    share = counts / counts.sum().clamp(min=1)
    return (-(share * (share + 1e-10).log()).sum()).exp()
