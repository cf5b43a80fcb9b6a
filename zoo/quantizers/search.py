"""Nearest codes: the one search behind every quantizer of the zoo."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor

from zoo.errors import ZooError


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code with the smallest squared Euclidean distance: the lowest index where several are equal.

    The matrix of all distances is never held: products of a block of codes with a block of vectors are reduced to the
    minimum of each group of neighbouring codes, and the distances to the best groups are computed again in float64.
    So an id does not depend on how many vectors are searched together, whose products may differ in the last bits.
    Search of unit vectors: normalise both arguments.

    Args:
        vectors: (..., D) of any floating dtype; searched in float32 whatever the autocast.
        codebook: (K, D).

    Returns:
        (...) int64 in 0..K-1. A vector that is not finite gets a code of no meaning.
    """
    if vectors.shape[-1] != codebook.shape[-1]:
        raise ZooError(f"vectors of width {vectors.shape[-1]} cannot be searched in codes of {codebook.shape[-1]}.")
    num_codes, dim = codebook.shape
    # On a CPU a block of products stays in the cache until it is reduced.
    rows, codes = (512, 1024) if vectors.device.type == "cpu" else (4096, 16384)
    size = math.gcd(num_codes, 8)  # codes of a group
    flat = vectors.reshape(-1, dim)
    codebook = codebook.float()
    half = codebook.square().sum(1, keepdim=True) / 2
    ids = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    product = torch.empty(min(codes, num_codes), min(rows, len(flat)), device=flat.device)
    minima = torch.empty(num_codes // size, product.shape[1], device=flat.device)
    groups = torch.arange(num_codes // size, dtype=torch.int32, device=flat.device)[:, None]
    with _full_float32(flat.device.type):
        for block, out in zip(flat.split(rows), ids.split(rows), strict=True):
            z = block.float()
            n = len(z)
            if n < minima.shape[1]:
                product, minima = product.new_empty(len(product), n), minima.new_empty(len(minima), n)
            columns = z.T.contiguous()
            for start in range(0, num_codes, codes):
                part = codebook[start : start + codes]
                # |e|^2 / 2 - e.z orders codes as |e - z|^2 does
                torch.addmm(half[start : start + codes], part, columns, alpha=-1, out=product[: len(part)])
                found = minima[start // size : (start + len(part)) // size]
                torch.amin(product[: len(part)].view(-1, size, n), 1, out=found)
            best = minima.amin(0)
            # Twice the rounding error of a product, from the lengths of the vector and of codes as near as the best
            length = z.square().sum(1)
            reach = length.sqrt() + (length + 2 * best).clamp(min=0).sqrt()
            error = 2 * (dim + 8) * 2.0**-24 * (length.sqrt() * reach + reach.square() / 2)
            last = groups[-1]
            first = torch.where(minima <= best, groups, last).amin(0)
            lowest = torch.where(minima <= best + error, groups, last).amin(0)
            near = torch.stack([torch.minimum(first, lowest), first], 1).long()
            candidates = (near[..., None] * size + torch.arange(size, device=flat.device)).flatten(1)
            exact = (codebook[candidates].double() - z[:, None]).square_().sum(-1)
            torch.gather(candidates, 1, exact.argmin(1, keepdim=True), out=out[:, None])
    return ids.view(vectors.shape[:-1])


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """|z|^2 + |e|^2 - 2 z.e of all pairs, (N, D) and (K, D) -> (N, K) float32: for a few vectors only."""
    z, e = vectors.float(), codebook.float()
    return z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T


@contextmanager
def _full_float32(device: str):
    """Products in float32 proper, without autocast and without TF32."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        switch.fp32_precision = before
