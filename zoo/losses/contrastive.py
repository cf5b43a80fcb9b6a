"""Losses between images and their texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.distributed import gather_over_ranks, rank


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (arXiv 2303.15343, algorithm 1), a scalar.

    -1/B sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), z_ij = 1 where image and text belong together, else -1.

    images (B, D) and texts (K, D), L2-normalised; text first + i is that of image i, and others belong to none of these
    images; scale > 0. At least float32 whatever the autocast: the logits of pairs that do not belong together are
    large, and what they differ by is small.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (images, texts))
        logits = scale * images @ texts.T + bias
        signs = -torch.ones_like(logits)
        signs.diagonal(first).fill_(1)
        return -F.logsigmoid(signs * logits).sum() / len(images)


def sigmoid_loss_over_ranks(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, negatives: Tensor | None = None
) -> Tensor:
    """sigmoid_loss of this rank's images with the texts of all ranks; as many pairs (B, D) on each.

    negatives: more texts (M, D) that belong to no image, as many on each rank.

    The mean over N ranks, in value and in gradient (which DDP averages), is the loss of one rank with N * B pairs. No
    rank holds the logits of all pairs.
    """
    gathered = [gather_over_ranks(one) for one in (texts, negatives) if one is not None]
    return sigmoid_loss(images, torch.cat(gathered), scale, bias, first=rank() * len(images))
