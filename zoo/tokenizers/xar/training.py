"""Training of xAR (section 3.3 of the paper and the authors' script)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.flow import interpolate, velocity
from zoo.tokenizers.xar.generator import XARGenerator


class FlowLoss(NamedTuple):
    """What a training pass gives."""

    loss: Tensor
    prediction: Tensor
    """(B, L, C) velocities."""
    noisy: Tensor
    """(B, L, C): what the network read."""


def drop_labels(labels: Tensor, no_class: int, share: float, uniform: Tensor | None = None) -> Tensor:
    """Labels (B,) of which a share becomes "no class": those whose draw from U[0, 1) is below it."""
    uniform = torch.rand(labels.shape, device=labels.device) if uniform is None else uniform
    return labels.where(uniform >= share, no_class)


def flow_loss(
    generator: XARGenerator, latents: Tensor, labels: Tensor, times: Tensor, noise: Tensor, clean_context: bool = False
) -> FlowLoss:
    """Mean squared error of all velocities, each entity noised at its own time (noisy-context learning).

    Args:
        latents: (B, C, g, g), scaled.
        labels: (B,), already dropped.
        times: (B, E) in (0, 1).
        noise: (B, L, C) standard normal, in the order of the sequence.
        clean_context: instead of noisy context, each entity is predicted after clean ones, as in teacher forcing: the
            ablation of the paper.
    """
    cut = generator.partition
    data = cut.to_sequence(latents)
    t = times[:, cut.entity.to(times.device)]  # (B, L)
    noisy = interpolate(data, noise, t)
    prediction = generator(noisy, labels, times)
    return FlowLoss((prediction - velocity(data, noise)).square().mean(), prediction, noisy)
