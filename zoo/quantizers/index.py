"""Vector quantisation by index backpropagation: every step moves every code (IBQ, arXiv 2412.02692)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.distributed import sum_over_ranks, world_size
from zoo.errors import ZooError
from zoo.quantizers.ema import code_counts, perplexity
from zoo.quantizers.search import full_float32, largest_product

CHUNK = {"cpu": 2**21, "cuda": 2**25}
"""Logits that are computed at a time: 8 MiB stay in the cache of a CPU."""
EPS = 1e-5
"""Within the logarithm of an average."""


class IndexQuantized(NamedTuple):
    """What IndexQuantizer gives."""

    quantized: Tensor
    """(..., D): codes. Their gradient reaches the vectors and all codes through the softmax, and the codes directly."""
    ids: Tensor
    """(...) int64."""
    loss: Tensor
    """Scalar, without the entropies."""
    perplexity: Tensor
    """Scalar: exp of the entropy of this batch's codes over all ranks, 1 to K."""
    entropy: Tensor
    """Scalar: sample_weight * sample_entropy - average_weight * average_entropy, a loss."""
    sample_entropy: Tensor
    """Scalar, in nats: of the codes of one vector, averaged over vectors; low where choices are clear."""
    average_entropy: Tensor
    """Scalar, in nats: of the average over the vectors of all ranks; high where all codes are used."""
    counts: Tensor
    """(K,) float32: how often each code was used over all ranks."""


class IndexQuantizer(nn.Module):
    """The code with the largest inner product (arXiv 2412.02692, section 3.2, and the published code).

    With logits l = z E^T and p = softmax(l), what comes out is a E, where a is the one-hot vector of the id in value
    and p in gradient. So the gradient g of an output moves all codes: dl_k = p_k (g.e_k - sum_j p_j g.e_j), dz = sum_k
    dl_k e_k, de_k = dl_k z, and the chosen code gets g as well. There is no other way from the output to z.

    loss = mean((a E - z)^2) + mean((sg(e) - z)^2) + commitment * mean((e - sg(z))^2), e the chosen code. Entropies are
    those of q = softmax(l / temperature); that of the average of q over a batch is -sum qbar log(qbar + 1e-5).

    All is in float32, whatever the autocast, and by chunks of vectors whose logits the backward pass computes again:
    the logits of all vectors with all codes are never held.

    Args:
        num_codes, dim: K and D; codes begin as N(0, 1).
        commitment: see above; as published the term that moves the codes.
        temperature: of the entropies; 0: there are none, and both are 0.
        sample_weight, average_weight: of the two in `entropy`.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float = 0.25,
        temperature: float = 0.01,
        sample_weight: float = 1.0,
        average_weight: float = 1.0,
    ):
        super().__init__()
        if temperature < 0:
            raise ZooError(f"IndexQuantizer.temperature must be above 0, or 0 for no entropies, got {temperature}.")
        self.commitment, self.temperature = commitment, temperature
        self.sample_weight, self.average_weight = sample_weight, average_weight
        self.codebook = nn.Parameter(torch.randn(num_codes, dim))

    def forward(self, z: Tensor) -> IndexQuantized:
        """z (..., D)."""
        ids = self.encode(z)
        with torch.autocast(z.device.type, enabled=False):
            exact = z.float()
            quantized, codes, sample, average = IndexBackpropagation.apply(
                exact.reshape(-1, z.shape[-1]), self.codebook.float(), ids.flatten(), self.temperature
            )
            quantized, codes = quantized.view(z.shape), codes.view(z.shape)
            loss = F.mse_loss(quantized, exact) + F.mse_loss(exact, codes.detach())
            loss = loss + self.commitment * F.mse_loss(codes, exact.detach())
            entropy = self.sample_weight * sample - self.average_weight * average
            counts = code_counts(ids.flatten(), len(self.codebook))
        used = perplexity(counts), entropy, sample, average, counts
        return IndexQuantized(quantized.to(z.dtype), ids, loss, *used)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each codebook."""
        return (len(self.codebook),)

    def encode(self, z: Tensor) -> Tensor:
        """z (..., D) -> ids (...) int64."""
        return largest_product(z, self.codebook)

    def codes(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D): what the decoder reads for them."""
        return self.codebook[ids]


class IndexBackpropagation(torch.autograd.Function):
    """z (M, D), codebook (K, D), ids (M,) and a temperature to the codes of the ids with the gradient of a E, the same
    codes with the gradient of a lookup, and the two entropies; see IndexQuantizer.

    Ranks have equal M. The average q is one of all ranks and so is its entropy: each rank propagates into its own
    vectors as if they were all, and the mean of the gradients over ranks, which DDP takes, is that of one process.
    """

    @staticmethod
    def forward(context, z: Tensor, codebook: Tensor, ids: Tensor, temperature: float):
        codes = codebook[ids]
        sample, mean = z.new_zeros(()), z.new_zeros(len(codebook))
        if temperature:
            with full_float32(z.device.type):
                for vectors in z.split(_chunk(codebook)):
                    logits = _sharpened_(vectors @ codebook.T, temperature)
                    q = logits.softmax(1)
                    # log of the largest q is minus that of the sum of exp(logits), whose largest is exp(0)
                    sample -= (q.amax(1).log() + torch.linalg.vecdot(q, logits)).sum() / len(z)
                    mean += q.sum(0)
            mean = sum_over_ranks(mean)[0] / (len(z) * world_size())
        average = -(mean * (mean + EPS).log()).sum()
        context.save_for_backward(z, codebook, ids, mean)
        context.temperature = temperature
        context.set_materialize_grads(False)
        return codes, codes.clone(), sample, average

    @staticmethod
    @once_differentiable
    def backward(context, of_quantized, of_codes, of_sample, of_average):
        z, codebook, ids, mean = context.saved_tensors
        temperature, step = context.temperature, _chunk(codebook)
        of_z, of_codebook = torch.zeros_like(z), torch.zeros_like(codebook)
        # the gradient by q of a vector is by_logit * logits / temperature + by_mean, up to a constant
        has_entropy = temperature and (of_sample is not None or of_average is not None)
        by_logit = 0 if of_sample is None else -of_sample / len(z)
        by_mean = -((mean + EPS).log() + mean / (mean + EPS)) * (0 if of_average is None else of_average / len(z))
        with full_float32(z.device.type):
            for i in range(0, len(z), step) if has_entropy or of_quantized is not None else ():
                vectors, of_logits = z[i : i + step], 0
                logits = vectors @ codebook.T
                if of_quantized is not None:
                    of_logits = _through_softmax_(logits.softmax(1), of_quantized[i : i + step] @ codebook.T)
                if has_entropy:
                    logits = _sharpened_(logits, temperature)
                    q = logits.softmax(1)
                    of_logits += _through_softmax_(q, logits.mul_(by_logit).add_(by_mean)).div_(temperature)
                torch.mm(of_logits, codebook, out=of_z[i : i + step])
                of_codebook.addmm_(of_logits.T, vectors)
        for gradient in (of_quantized, of_codes):
            if gradient is not None:
                of_codebook.index_add_(0, ids, gradient)
        return of_z, of_codebook, None, None


def _chunk(codebook: Tensor) -> int:
    """Vectors whose logits are held at a time; fewer than 48 would wait for the codes to be read."""
    return max(48, CHUNK.get(codebook.device.type, CHUNK["cuda"]) // len(codebook))


def _sharpened_(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in place, less the largest of each row: entropies are differences of large numbers."""
    logits.div_(temperature)
    return logits.sub_(logits.amax(1, keepdim=True))


def _through_softmax_(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of logits from that of their softmax p, both (R, K), in place of the latter."""
    return gradient.sub_(torch.linalg.vecdot(p, gradient)[:, None]).mul_(p)
