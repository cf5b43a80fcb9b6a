"""Vector quantisation whose codes are parameters, learned by gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.quantizers.ema import EMAQuantizer, Quantized, code_counts, perplexity
from zoo.quantizers.search import nearest_code


class VectorQuantizer(nn.Module):
    """Nearest code with a straight-through gradient (van den Oord et al. 2017, equation 3).

    loss = commitment * mean((sg(code) - z)^2) + codebook_weight * mean((code - sg(z))^2), means over all elements.

    Args:
        num_codes, dim: K and D.
        commitment, codebook_weight: weights of the two terms.
        normalize: vectors and codes are divided by their length before the search and in all that follows, so that
            what comes out are unit vectors; codes get their gradient through the division.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        normalize: bool = False,
    ):
        super().__init__()
        self.commitment, self.codebook_weight, self.normalize = commitment, codebook_weight, normalize
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))

    def forward(self, z: Tensor) -> Quantized:
        """z (..., D), in float32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            ids = self.encode(z)
            exact, codes = self._scaled(z.float()), self.codes(ids).float()
            loss = self.commitment * F.mse_loss(exact, codes.detach())
            loss = loss + self.codebook_weight * F.mse_loss(codes, exact.detach())
            quantized = (exact + (codes - exact).detach()).to(z.dtype)
            counts = code_counts(ids.flatten(), len(self.codebook))
        return Quantized(quantized, ids, loss, perplexity(counts), counts)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each codebook."""
        return (len(self.codebook),)

    def encode(self, z: Tensor) -> Tensor:
        """z (..., D) -> ids (...) int64."""
        return nearest_code(self._scaled(z.float()), self._scaled(self.codebook.float()))

    def codes(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D): what the decoder reads for them."""
        return self._scaled(self.codebook[ids])

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def codebook_quantizer(
    num_codes: int,
    dim: int,
    commitment: float = 0.25,
    codebook_weight: float = 1.0,
    ema_decay: float = 0.0,
    restart_below: float = 0.0,
    normalize: bool = False,
) -> VectorQuantizer | EMAQuantizer:
    """Codes that are running means started from data where there is a decay, else codes learned by gradient."""
    if ema_decay:
        return EMAQuantizer(
            num_codes, dim, ema_decay, commitment, init="data", restart_below=restart_below, normalize=normalize
        )
    return VectorQuantizer(num_codes, dim, commitment, codebook_weight, normalize)
