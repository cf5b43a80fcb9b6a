"""Nearest codes, and codes of the largest inner product: the one search behind every quantizer of the zoo."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor

from zoo.errors import ZooError


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code with the smallest squared Euclidean distance; the lowest index where several are equal.

    Products of a block of vectors with a chunk of codes are reduced to the minimum of each group of codes while they
    are in the cache; the matrix of all distances is never held. A product's last bits depend on how many rows are
    multiplied at once, so its two best groups are computed again in float64: an id does not depend on the batch.
    Search of unit vectors: normalise both arguments.

    Args:
        vectors: (..., D) of any floating dtype; searched in float32 whatever the autocast or TF32 setting.
        codebook: (K, D). Codes that are not finite are never chosen.

    Returns:
        (...) int64 in 0..K-1, without gradient; 0 for vectors that are not finite.

    Raises:
        ZooError: the codebook is empty or no matrix, or the widths differ.
    """
    return _search(vectors, codebook, euclidean=True)


@torch.no_grad()
def largest_product(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code with the largest inner product; arguments, ties and all else as in nearest_code.

    Long codes win: this is not the nearest code, unless all are of one length.
    """
    return _search(vectors, codebook, euclidean=False)


def _search(vectors: Tensor, codebook: Tensor, euclidean: bool) -> Tensor:
    if codebook.ndim != 2 or vectors.ndim == 0 or not len(codebook) or vectors.shape[-1] != codebook.shape[1]:
        raise ZooError(
            f"a search takes vectors (..., D) and a codebook (K, D) with K >= 1 of the same width, "
            f"got {tuple(vectors.shape)} and {tuple(codebook.shape)}."
        )
    codebook = codebook.float() if codebook.dtype == torch.float64 else codebook  # a search is in float32 at most
    (num_codes, dim), device = codebook.shape, vectors.device
    rows, chunk = (1024, 1024) if device.type == "cpu" else (2048, 8192)
    group = 1 if num_codes <= 1024 else 8
    chunk = min(chunk, math.ceil(num_codes / group) * group)
    starts = range(0, num_codes, chunk)

    flat = vectors.reshape(-1, dim)
    ids = torch.empty(len(flat), dtype=torch.int64, device=device)
    lengths = torch.linalg.vector_norm(codebook, dim=1, keepdim=True, dtype=torch.float32)
    longest = lengths.where(lengths.isfinite(), 0).amax()
    offset = lengths.square() / 2 if euclidean else lengths.where(~lengths.isfinite(), 0)
    offset.nan_to_num_(nan=math.inf, posinf=math.inf)
    products = torch.empty(chunk, min(rows, len(flat)), dtype=torch.float32, device=device)
    minima = products.new_empty(len(starts), chunk // group, products.shape[1])

    with full_float32(device.type):
        for block, found in zip(flat.split(rows), ids.split(rows), strict=True):
            z = block.float()
            columns = z.T.contiguous()
            scores, out = minima[..., : len(z)], products[:, : len(z)]
            for start, least in zip(starts, scores, strict=True):
                codes = codebook[start : start + chunk].float().nan_to_num(0, 0, 0)
                # |e|^2 / 2 - e.z orders codes as |e - z|^2 does, without the rounding of |z|^2
                torch.addmm(offset[start : start + chunk], codes, columns, alpha=-1, out=out[: len(codes)])
                out[len(codes) :] = math.inf
                torch.amin(out.view(len(least), group, len(z)), 1, out=least)

            # two chunks, then two of their groups, then the one code
            of_chunks = scores.amin(1)
            limit = of_chunks.amin(0)
            limit = limit + (_rounding(z, limit) if euclidean else _rounding_of_products(z, longest))
            chunks = _two_best(of_chunks, limit)
            of_groups = scores.gather(0, chunks[:, None].expand(-1, scores.shape[1], -1))
            of_groups[1].masked_fill_(chunks[0] == chunks[1], math.inf)
            groups = _two_best(of_groups.flatten(0, 1), limit)
            groups = chunks.gather(0, groups // scores.shape[1]) * scores.shape[1] + groups % scores.shape[1]
            candidates = (groups.T[..., None] * group + torch.arange(group, device=device)).flatten(1)
            candidates.clamp_(max=num_codes - 1)
            exact = codebook[candidates].double()
            if euclidean:
                exact = exact.sub_(z[:, None]).square_().sum(-1)
            else:
                exact = offset[candidates, 0] - exact.mul_(z[:, None]).sum(-1)
            exact.nan_to_num_(nan=math.inf, posinf=math.inf)
            best = candidates.gather(1, exact.argmin(1, keepdim=True))[:, 0]
            found.copy_(best.where(z.isfinite().all(1), 0))
    return ids.view(vectors.shape[:-1])


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """|z|^2 + |e|^2 - 2 z.e of all pairs, (N, D) and (K, D) -> (N, K) float32: for a few vectors only."""
    z, e = vectors.float(), codebook.float()
    return z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T


def _rounding(z: Tensor, best: Tensor) -> Tensor:
    """Bound on how far rounding moves the difference of two scores that are as good as the best, (N, D), (N,) -> (N,).

    Such codes are no longer than |z| + sqrt(|z|^2 + 2 best), so that a huge code elsewhere does not matter.
    """
    length = torch.linalg.vector_norm(z, dim=1)
    reach = length + (length.square() + 2 * best).clamp(min=0).sqrt()
    return 2 * (z.shape[1] + 8) * 2.0**-24 * (length * reach + reach.square() / 2)


def _rounding_of_products(z: Tensor, longest: Tensor) -> Tensor:
    """The same bound for products with codes up to the longest, (N, D), scalar -> (N,)."""
    return 2 * (z.shape[1] + 8) * 2.0**-24 * torch.linalg.vector_norm(z, dim=1) * longest


def _two_best(scores: Tensor, limit: Tensor) -> Tensor:
    """(C, N), (N,) -> (2, N) in ascending order: the index of the minimum and the first other index within the limit.

    The first, not the second smallest: among many equal codes the lowest index has to be there.
    """
    best = scores.argmin(0)
    near = (scores <= limit).scatter_(0, best[None], False)
    return torch.stack([best, near.to(torch.uint8).argmax(0)]).sort(0).values


@contextmanager
def full_float32(device: str):
    """Products in float32 proper, without autocast and without TF32."""
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
