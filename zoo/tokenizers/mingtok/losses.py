"""Reconstruction losses of the authors' code, on patches of the pixel decoder."""

from __future__ import annotations

import math

from torch import Tensor

from zoo.errors import ZooError, nearest
from zoo.nn.patches import patchify


def span_to_range(prediction: Tensor) -> Tensor:
    """Scaled so that the least and the largest value of the whole batch become -1 and 1."""
    low, high = prediction.aminmax()
    return 2 * (prediction - low) / (high - low) - 1


LOSSES = {
    "L1-plain": lambda prediction, target: (prediction - target).abs(),
    "L1-tanh": lambda prediction, target: (prediction.tanh() - target).abs(),
    "L1": lambda prediction, target: (span_to_range(prediction) - target).abs(),
    "L2": lambda prediction, target: (prediction - target).square(),
}


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch (..., P) with mean 0 and variance 1, as in masked autoencoders (arXiv 2111.06377)."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def patch_loss(
    prediction: Tensor,
    values: Tensor,
    patch_size: int,
    kind: str = "L1-plain",
    norm_pix: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over the patches that were visible of the mean error of each, a scalar.

    Args:
        prediction: patches (B, L, P) of PixelDecoder.patches.
        values: (B, 3, H, W) in [-1, 1], square.
        patch_size: of the pixel decoder.
        kind: "L1-plain" (published), "L1-tanh", "L1" (of predictions that are scaled to -1..1 over the batch) or "L2".
        norm_pix: of "L2": the target is each patch with mean 0 and variance 1; others ignore it, as published.
        mask: (B, N) bool over the latents, True for patches that were hidden from the encoder.
    """
    if kind not in LOSSES:
        raise ZooError(f"no loss of patches is called '{kind}'{nearest(kind, LOSSES)}")
    target = patchify(values, patch_size)
    if norm_pix and kind == "L2":
        target = normalize_patches(target)
    errors = LOSSES[kind](prediction, target).mean(-1)
    if mask is None:
        return errors.mean()
    visible = ~spread_mask(mask, errors.shape[1])
    return (errors * visible).sum() / visible.sum()


def spread_mask(mask: Tensor, count: int) -> Tensor:
    """(B, N) over a square grid to (B, count) over a finer one, both in raster order."""
    side = math.isqrt(mask.shape[1])
    ratio = math.isqrt(count) // side
    grid = mask.unflatten(1, (side, side))
    return grid.repeat_interleave(ratio, dim=1).repeat_interleave(ratio, dim=2).flatten(1)
