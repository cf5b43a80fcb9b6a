"""How good generated images are: Inception Score, and Frechet distance to a reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore

from zoo.errors import ZooError
from zoo.metrics.frechet import FrechetDistance, Inception

BATCH = 32
MANY = 50_000
"""Images that given moments count for; only their ratio to those of the covariance's correction matters."""


def read_reference(path: str | Path) -> dict[str, np.ndarray]:
    """An .npz in the layout of ADM's evaluation: images arr_0 (N, H, W, 3) uint8, or mu (D,) and sigma (D, D).

    Raises ZooError for any other file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in ("mu", "sigma", "arr_0") if name in file.files}
    except (OSError, ValueError) as error:
        raise ZooError(f"reference={path} is no .npz that can be read ({error}).") from error
    images = content.get("arr_0")
    if {"mu", "sigma"} <= content.keys():
        return content
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ZooError(f"reference={path} holds neither mu and sigma nor images arr_0 (N, H, W, 3) of bytes.")
    return content


def frechet_distance(images: np.ndarray, reference: str | Path, features: str, device: torch.device) -> float:
    """Distance of images (N, H, W, 3) uint8 to a reference of `read_reference`; features: of FrechetDistance.

    Raises MissingWeights when those of Inception are not on this machine.
    """
    metric, content = FrechetDistance(features).to(device), read_reference(reference)
    if "mu" in content:
        metric.set_real(torch.from_numpy(content["mu"]), torch.from_numpy(content["sigma"]), MANY)
    else:
        for batch in batches(content["arr_0"]):
            metric.update(None, batch.to(device))
    for batch in batches(images):
        metric.update(batch.to(device), None)
    return next(iter(metric.compute().values())).item()


def inception_score(images: np.ndarray, device: torch.device) -> float:
    """exp of the mean KL divergence of class probabilities from their mean, over 10 splits (arXiv 1606.03498).

    images: (N, H, W, 3) uint8. Raises MissingWeights when those of Inception are not on this machine.
    """
    metric = InceptionScore(feature=Inception("logits_unbiased")).to(device)
    for batch in batches(images):
        metric.update(batch.to(device))
    with torch.random.fork_rng(devices=[]):  # it deals the images to the splits at random
        torch.manual_seed(0)
        return metric.compute()[0].item()


def batches(images: np.ndarray):
    """(N, H, W, 3) uint8 to float (B, 3, H, W) in [0, 1], B at the most BATCH."""
    for start in range(0, len(images), BATCH):
        batch: Tensor = torch.from_numpy(images[start : start + BATCH])
        yield batch.movedim(-1, 1).float() / 255
