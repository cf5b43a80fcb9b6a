"""Batch statistics over ranks."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zoo.nn.normalization import BatchNorm2d


def layer():
    torch.manual_seed(0)
    norm = BatchNorm2d(3).train()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def step(norm, x):
    x.requires_grad_()
    out = norm(x)
    # a loss that is no sum over images: its gradient goes through the statistics
    (out.square() * torch.arange(out.shape[-1])).mean().backward()
    return out.detach(), x.grad


def inputs():
    return torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(1)) * 3 + 1


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    norm = layer()
    out, grad = step(norm, inputs()[2 * rank : 2 * rank + 2].clone())
    torch.save((out, grad, norm.weight.grad, norm.running_mean, norm.running_var), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_with_twice_the_batch(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    norm = layer()
    out, grad = step(norm, inputs())
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), out)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / 2, grad)  # each rank's loss is a mean over its half
    torch.testing.assert_close((ranks[0][2] + ranks[1][2]) / 2, norm.weight.grad)
    for _, _, _, mean, variance in ranks:
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(variance, norm.running_var)
