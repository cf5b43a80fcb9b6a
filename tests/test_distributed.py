import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zoo.distributed import (
    all_or_none,
    from_first_rank,
    gather_over_ranks,
    leave,
    min_over_ranks,
    rows_of_all_ranks,
    sum_over_ranks,
    world_size,
)
from zoo.errors import ZooError


def failure(rank: int) -> str | None:
    """What a rank raises where only rank 1 fails."""
    try:
        with all_or_none():
            if rank == 1:
                raise KeyError("lost")
    except (KeyError, ZooError) as error:
        return repr(error)


def results(rank: int) -> dict:
    """What a rank gets from every function, from inputs that differ between ranks."""
    total, matrix = sum_over_ranks(torch.tensor(1.0 + rank), torch.full((2, 3), float(rank)))
    rows = torch.arange(4).view(2, 2) + 10 * rank
    return {
        "size": world_size(),
        "total": total.item(),
        "matrix": matrix.tolist(),
        "least": min_over_ranks(torch.tensor([1.0 + rank, 3.0 - rank])).tolist(),
        "first": from_first_rank(torch.tensor([[1, 2], [3, 4]]).T + rank).tolist(),
        "gathered": gather_over_ranks(torch.tensor([[1, 2]]) + rank).tolist(),
        "rows": rows_of_all_ranks(rows, torch.tensor([1, 0, world_size() * 2 - 1])).tolist(),
        "failure": failure(rank),
    }


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(results(rank), f"{folder}/{rank}.pt")
    leave()
    assert not dist.is_initialized()
    leave()  # nothing is left to close


def test_every_rank_gets_what_all_ranks_have_together(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == {
            "size": 2,
            "total": 3.0,
            "matrix": [[1.0] * 3] * 2,
            "least": [1.0, 2.0],
            "first": [[1, 3], [2, 4]],
            "gathered": [[1, 2], [2, 3]],
            "rows": [[2, 3], [0, 1], [12, 13]],
            "failure": ["ZooError(\"rank 1 failed with KeyError: 'lost'\")", "KeyError('lost')"][rank],
        }


def test_one_process_gets_what_it_has():
    assert results(5) == {
        "size": 1,
        "total": 6.0,
        "matrix": [[5.0] * 3] * 2,
        "least": [6.0, -2.0],
        "first": [[6, 8], [7, 9]],
        "gathered": [[6, 7]],
        "rows": [[52, 53], [50, 51], [52, 53]],
        "failure": None,
    }
