"""Residual quantisation against vector-quantize-pytorch, and encoding against timm's tower alone, on the CPU.

    python benchmarks/residual_quantizer.py [--threads 1] [--rounds 3] [--images 2] [--name dualtoken-256]

Quantizers: --images images of the patches of the name, its levels of one codebook. Peer: ResidualVQ with a shared
codebook of the same codes, in evaluation, and in a step of training (forward, backward of its loss, codes moved and
restarted). The ids of both are compared: they differ where two codes are as near but for rounding. Extra memory is
measured in a process of its own for each. Encoding: one image to the ids of both streams, against the forward of the
vision transformer of timm with the same weights. Contenders take turns, and the tables have the best of the rounds.
"""

import argparse
from collections.abc import Callable

import torch
from _memory import extra_memory, in_a_process_of_its_own
from _timing import best_of
from rich.console import Console
from rich.table import Table
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

import zoo
from zoo.quantizers import ResidualQuantizer
from zoo.tokenizers.dualtoken.tokenizer import DualTokenConfig

PEER, TOWER = "vector-quantize-pytorch", "timm's tower"
TASKS = ["rq, evaluation", "rq, training", "rq_ema, training"]


def make(config: DualTokenConfig, task: str, images: int) -> dict[str, Callable[[], Tensor]]:
    """Both contenders at a task, as functions without arguments that return ids (N, levels)."""
    kind, mode = task.split(", ")
    stream, dim = config.pixel, config.embed_dim
    torch.manual_seed(0)
    z = torch.randn(images * config.encoder.num_patches, dim, requires_grad=mode == "training")
    ours = ResidualQuantizer(stream.codebook_size, dim, stream.levels, kind=kind, ema_vectors="level")
    peer = ResidualVQ(
        dim=dim,
        num_quantizers=stream.levels,
        codebook_size=stream.codebook_size,
        shared_codebook=True,
        decay=stream.decay,
        threshold_ema_dead_code=1,
    )
    peer.layers[0]._codebook.embed.data.copy_(ours.codebooks[0].codebook)
    for one in (ours, peer):
        one.train(mode == "training")

    def of_zoo() -> Tensor:
        out = ours(z)
        if mode == "training":
            (out.loss + out.quantized.sum()).backward()
        return out.ids

    def of_peer() -> Tensor:
        quantized, ids, losses = peer(z[None])
        if mode == "training":
            (losses.mean() + quantized.sum()).backward()
        return ids[0]

    return {"zoo": of_zoo, PEER: of_peer}


def measure(config: DualTokenConfig, task: str, images: int, name: str) -> None:
    small = zoo.create_tokenizer("dualtoken-tiny").config
    make(small, task, 1)[name]()
    print(extra_memory(make(config, task, images)[name]))


def quantizers(config: DualTokenConfig, args: argparse.Namespace) -> Table:
    table = Table("", "", "ms", "peer / zoo", "extra MiB", title=f"{args.name}, {args.threads} thread(s)")
    for task in TASKS:
        contenders = make(config, task, args.images)
        first = {name: call() for name, call in contenders.items()}
        agree = (first["zoo"][:, 0] == first[PEER][:, 0]).double().mean().item()
        best, _ = best_of(args.rounds, contenders)
        for name in contenders:
            own = ("--measure", task, name, "--name", args.name, "--images", args.images, "--threads", args.threads)
            table.add_row(
                task if name == "zoo" else f"[dim]first ids agree: {agree:.2%}",
                name,
                f"{best[name] * 1e3:.0f}",
                f"{best[PEER] / best['zoo']:.2f}" if name == "zoo" else "",
                f"{in_a_process_of_its_own(__file__, *own):.0f}",
                end_section=name == PEER,
            )
    return table


@torch.inference_mode()
def encoding(args: argparse.Namespace) -> Table:
    tokenizer = zoo.create_tokenizer(args.name).eval()
    size = tokenizer.info.image_size
    image = torch.rand(1, 3, size, size)
    tower = tokenizer.encoder.vision
    best, _ = best_of(
        args.rounds,
        {"zoo, ids of both streams": lambda: tokenizer.encode(image), TOWER: lambda: tower(2 * image - 1)},
    )
    table = Table("one image", "ms", "/ tower", title=f"{args.name}, {args.threads} thread(s)")
    for name, seconds in best.items():
        table.add_row(name, f"{seconds * 1e3:.0f}", f"{seconds / best[TOWER]:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="more only where nothing else runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--name", default="dualtoken-256")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = zoo.registry.preset(args.name).config
    if args.measure:
        return measure(config, args.measure[0], args.images, args.measure[1])
    console = Console(width=100)
    console.print(quantizers(config, args))
    console.print(encoding(args))


if __name__ == "__main__":
    main()
