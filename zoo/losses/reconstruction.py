"""Reconstruction losses by the names that the authors' configurations use."""

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError, nearest


def mse_ignore_zero(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error where the target is above 0: maps without a value everywhere (AiT depth)."""
    valid = target > 0
    return ((prediction - target).square() * valid).sum() / valid.sum()


def si_log(prediction: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant log error where the target is above 0: sqrt(mean(d^2) - 0.5 mean(d)^2), d = log t - log p."""
    valid = target > 0
    d = target[valid].log() - prediction[valid].log()
    return (d.square().mean() - 0.5 * d.mean().square()).sqrt()


RECONSTRUCTION = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "mse_ignore_zero": mse_ignore_zero,
    "si_log": si_log,
}


def reconstruction_loss(name: str):
    """The loss (prediction, target of equal shape) -> scalar of a name. Raises ZooError for an unknown one."""
    if name not in RECONSTRUCTION:
        raise ZooError(f"no reconstruction loss is called '{name}'{nearest(name, RECONSTRUCTION)}")
    return RECONSTRUCTION[name]
