"""Sums over ranks, for everything that a rank computes from its own batch. Without torch.distributed: the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """Each tensor summed over all ranks, in one collective for all of them; they share a dtype. No gradient."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gather_rows(tensor: Tensor) -> Tensor:
    """(M, ...) of every rank, in the order of the ranks: (ranks * M, ...). M is the same everywhere. No gradient."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)
