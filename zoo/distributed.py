"""What ranks have to agree on. Without torch.distributed every function here is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def leave() -> None:
    """Close the group of ranks, while the interpreter is still whole.

    Gloo's threads may hold tensors, and letting go of one later aborts the process. Lightning closes those of NCCL.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """Each tensor summed over all ranks, in one collective for all of them; they share a dtype. No gradient."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def min_over_ranks(tensor: Tensor) -> Tensor:
    """The smallest of all ranks, element by element. No gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def from_first_rank(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, on every rank. No gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(tensor, src=0)
    return tensor


def rows_of_all_ranks(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (M, ...) of all ranks, one after the other, at index (K,): (K, ...) on every rank. No gradient.

    M and the index are the same on every rank. Only the K rows travel.
    """
    local = index - rank() * len(rows)
    own = (local >= 0) & (local < len(rows))
    found = rows.detach()[local.clamp(0, len(rows) - 1)]
    return sum_over_ranks(found.where(own.view(-1, *[1] * (rows.ndim - 1)), 0))[0]


def on_first_rank(items: list) -> list | None:
    """The lists of all ranks, one rank after the other, on the first rank, and None on the others.

    Items are anything that can be pickled, tensors on the CPU; ranks may have different numbers of them.
    """
    if world_size() == 1:
        return items
    lists = [None] * world_size() if rank() == 0 else None
    dist.gather_object(items, lists)
    return lists and [item for one in lists for item in one]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)[0].chunk(world_size())[rank()]


def gather_over_ranks(rows: Tensor) -> Tensor:
    """Rows (B, ...) of all ranks, as many on each, one rank after the other: (world size * B, ...).

    With gradient: that of a row is the sum of what all ranks propagate into it.
    """
    return rows if world_size() == 1 else _Gather.apply(rows.contiguous())


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)[0]

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)[0]


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of all ranks' tensors. With gradient: that of what all ranks make of it."""
    return tensor if world_size() == 1 else _Sum.apply(tensor) / world_size()
