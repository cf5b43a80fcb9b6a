"""Nearest-code search against the bare matrix product and against vector-quantize-pytorch, on the CPU.

    python benchmarks/quantizer.py [--threads 1] [--rounds 9] [--large-rounds 3]

Bare product: vectors @ codebook.T alone, which finds nothing yet. Peer: the forward of a Euclidean VectorQuantize in
evaluation. They take turns, and the table has the best of the rounds. Extra memory is measured in a process of its own
for each (Linux): the peak resident size (VmHWM) after one call less that before it, inputs made and libraries warm.
The ids of zoo and peer are compared.
"""

import argparse

import torch
from _memory import extra_memory, in_a_process_of_its_own
from _timing import best_of
from rich.console import Console
from rich.table import Table
from vector_quantize_pytorch import VectorQuantize

from zoo.quantizers import nearest_code

SIZES = [(4096, 16384, 32), (4096, 131072, 256)]
NAMES = ["bare product", "zoo", "vector-quantize-pytorch"]


def make(size: tuple[int, int, int]) -> dict:
    """Each contender as a function without arguments."""
    count, num_codes, dim = size
    torch.manual_seed(0)
    vectors, codebook = torch.randn(count, dim), torch.randn(num_codes, dim)
    peer = VectorQuantize(dim, codebook_size=num_codes).eval()
    peer._codebook.embed = codebook[None]
    return dict(zip(NAMES, (lambda: vectors @ codebook.T, lambda: nearest_code(vectors, codebook),
                            lambda: peer(vectors[None])[1][0]), strict=True))  # fmt: skip


def measure(name: str, size: tuple[int, int, int]) -> None:
    make((8, 64, 8))[name]()
    print(extra_memory(make(size)[name]))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="more only where nothing else runs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--large-rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        return measure(args.measure[0], tuple(map(int, args.measure[1:])))

    table = Table("N, K, D", "", "ms", "/ bare product", "/ peer", "extra MiB", title=f"{args.threads} thread(s)")
    for size in SIZES:
        contenders = make(size)
        rounds = args.rounds if size[1] < 2**16 else args.large_rounds
        best, results = best_of(rounds, contenders)
        ids, found = results["zoo"], results[NAMES[2]]
        agree = (found == ids).double().mean().item()
        for name in NAMES:
            table.add_row(
                ", ".join(map(str, size)) if name == NAMES[0] else "",
                name,
                f"{best[name] * 1e3:.1f}",
                f"{best[name] / best['bare product']:.2f}",
                f"{best[name] / best[NAMES[2]]:.3f}",
                f"{in_a_process_of_its_own(__file__, '--measure', name, *size, '--threads', args.threads):.0f}",
            )
        table.add_row("", f"[dim]ids of zoo and peer agree: {agree:.2%}", end_section=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
