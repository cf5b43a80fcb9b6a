"""Losses between images and their texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.distributed import gather_over_ranks, rank
from zoo.nn.precision import wide


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (arXiv 2303.15343, algorithm 1), a scalar.

    -1/B sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), z_ij = 1 where image and text belong together, else -1.

    images (B, D) and texts (K, D), L2-normalised; text first + i is that of image i, and others belong to none of these
    images; scale > 0. At least float32 whatever the autocast: the logits of pairs that do not belong together are
    large, and what they differ by is small.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = map(wide, (images, texts))
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


def contrastive_loss_over_ranks(
    images: Tensor,
    texts: Tensor,
    temperature: Tensor,
    smoothing: float = 0.0,
    gathers_gradient: bool = True,
    negatives: Tensor | None = None,
) -> Tensor:
    """The symmetric cross entropy of CLIP (arXiv 2103.00020, figure 3) of this rank's pairs against those of all ranks.

    The mean over N ranks, in value and in gradient (which DDP averages), is the loss of one rank with N * B pairs. In
    float32 whatever the autocast.

    Args:
        images, texts: (B, D), L2-normalised, as many on each rank.
        temperature: what similarities are divided by.
        smoothing: of the labels.
        gathers_gradient: False: what is compared with is a constant, the rank's own part too, so that an image learns
            from texts only through its own row, and a text from images likewise (BLIP-2's and SEED's code).
        negatives: more texts (M, D) that belong to no image, as many on each rank.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = wide(images), wide(texts)
        compared = [images, texts if negatives is None else torch.cat([texts, wide(negatives)])]
        if not gathers_gradient:
            compared = [one.detach() for one in compared]
        all_images = gather_over_ranks(compared[0])
        # of each rank its texts, then its negatives
        all_texts = gather_over_ranks(compared[1])
        first, count = rank() * len(compared[1]), len(images)
        places = torch.arange(count, device=images.device)
        of_images = F.cross_entropy(images @ all_texts.T / temperature, first + places, label_smoothing=smoothing)
        of_texts = F.cross_entropy(
            texts @ all_images.T / temperature, rank() * count + places, label_smoothing=smoothing
        )
        return (of_images + of_texts) / 2
