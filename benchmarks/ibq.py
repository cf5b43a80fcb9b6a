"""Index backpropagation by chunks against a plain softmax over all codes, on the CPU: a step of training.

    python benchmarks/ibq.py [--threads 1] [--rounds 3] [--vectors 1024] [--codes 16384 131072]

A step is forward and backward of the quantizer of IBQ (codes of 256 numbers), its loss, its entropies and a gradient
from behind. Peer: the same formula in plain torch, with the logits of all vectors and all codes held. Losses and
gradients of both are compared. Contenders take turns, and the table has the best of the rounds. Extra memory is
measured in a process of its own for each: the peak after one step less that before it, inputs and codes made.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _memory import extra_memory, in_a_process_of_its_own
from _timing import best_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.quantizers import IndexQuantizer

DIM, PEER = 256, "plain softmax"


def plain(quantizer: IndexQuantizer, z: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized (N, D) and the sum of the losses, as the equations stand."""
    codebook = quantizer.codebook
    logits = z @ codebook.T
    p = logits.softmax(1)
    hard = F.one_hot(p.argmax(1), len(codebook)).to(p.dtype)
    quantized, codes = ((hard - p).detach() + p) @ codebook, hard @ codebook
    loss = F.mse_loss(quantized, z) + F.mse_loss(codes.detach(), z) + 0.25 * F.mse_loss(codes, z.detach())
    scaled = logits / quantizer.temperature
    q, log_q = scaled.softmax(1), scaled.log_softmax(1)
    mean = q.mean(0)
    return quantized, loss - (q * log_q).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


def make(vectors: int, num_codes: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Both contenders as functions without arguments: loss, quantized, gradients of vectors and codes."""
    torch.manual_seed(0)
    quantizer = IndexQuantizer(num_codes, DIM)
    # near codes, as trained encoders are, so that choices are neither even nor all clear
    z = 0.05 * (quantizer.codebook[torch.randint(num_codes, (vectors,))].detach() + torch.randn(vectors, DIM))
    z, direction = z.requires_grad_(), torch.randn(vectors, DIM) / vectors

    def step(forward: Callable) -> list[Tensor]:
        quantized, loss = forward()
        total = loss + (quantized * direction).sum()
        return [total.detach(), quantized.detach(), *torch.autograd.grad(total, [z, quantizer.codebook])]

    def ours() -> tuple[Tensor, Tensor]:
        out = quantizer(z)
        return out.quantized, out.loss + out.entropy

    return {"zoo": lambda: step(ours), PEER: lambda: step(lambda: plain(quantizer, z))}


def measure(vectors: int, num_codes: int, name: str) -> None:
    make(8, 64)[name]()
    print(extra_memory(make(vectors, num_codes)[name]))


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference of any output over the largest number in it."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="more only where nothing else runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vectors", type=int, default=1024)
    parser.add_argument("--codes", type=int, nargs="+", default=[16384, 131072])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        return measure(args.vectors, int(args.measure[1]), args.measure[0])

    table = Table("N, K, D", "", "s", "/ peer", "extra MiB", "/ peer", title=f"{args.threads} thread(s)")
    for num_codes in args.codes:
        contenders = make(args.vectors, num_codes)
        best, results = best_of(args.rounds, contenders)
        own = ["--vectors", args.vectors, "--threads", args.threads]
        memory = {n: in_a_process_of_its_own(__file__, "--measure", n, num_codes, *own) for n in contenders}
        for name in contenders:
            table.add_row(
                f"{args.vectors}, {num_codes}, {DIM}" if name == "zoo" else "",
                name,
                f"{best[name]:.2f}",
                f"{best[name] / best[PEER]:.2f}",
                f"{memory[name]:.0f}",
                f"{memory[name] / memory[PEER]:.3f}",
            )
        table.add_row("", f"[dim]results differ by {difference(*results.values()):.1e}", end_section=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
