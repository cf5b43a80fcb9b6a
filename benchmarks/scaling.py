"""Is a training on N ranks the training on one rank with N times the batch?

Runs every tiny experiment (or those named) for some steps on the CPU, on 1, 2 and 4 ranks with the same images in all,
with DDP and sharded, and compares with one rank: losses and gradient norms of all steps, the weights and buffers after
the last one, and how they moved. Every difference is relative: |a - b| / |b|, of weights over all of them.

    python benchmarks/scaling.py                                    # all, 20 steps; what is in --output is kept
    python benchmarks/scaling.py vqgan-tiny --layouts ddp-2 --steps 5
    python benchmarks/scaling.py --precision 64-true                # tells rounding from error
    python benchmarks/scaling.py --write docs/scaling.md            # puts the table between the marks of that page
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from _runs import bare, experiments, write_table
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zoo.commands.train import train
from zoo.distributed import leave, sum_over_ranks, world_size
from zoo.training.sharding import whole

LAYOUTS = ("ddp-2", "ddp-4", "fsdp-2", "fsdp-4")
STRATEGIES = {
    "one": ["trainer.strategy=auto"],
    "ddp": ["trainer.strategy=ddp_find_unused_parameters_true"],
    "fsdp": [
        "trainer.strategy={_target_:zoo.training.sharding.ShardedStrategy,find_unused_parameters:true}",
    ],
}
WITH_DISCRIMINATOR = {
    "vqgan-tiny": [
        "module.adversarial_weight=0.1",
        "+module.optimizers.discriminator=${optimizer}",
        "optimizer.lr=2e-4",
    ],
    "ibq-tiny": [
        "module.adversarial_weight=0.1",
        "optimizer.lr=2e-4",
        "module.lecam_weight=0.05",
        "+module.optimizers.discriminator=${optimizer}",
    ],
    "dualtoken-tiny-1": ["module.adversarial_weight=0.75", "+module.optimizers.discriminator=${optimizer}"],
    "karl-finetune-tiny": ["module.adversarial_weights=[[0,0.2]]", "module.discriminator_every=2"],
}
"""Experiments that are run with one, too, as NAME+discriminator: its weight is made of gradients.

Learning rates are those of a run with one: at ten times as much any difference grows tenfold with each step.
"""
MEASURES = {"loss": "loss", "norm": "gradient norm", "weights": "weights", "update": "their change"}


class Record(L.Callback):
    """Writes what a training did to a file: {"loss": [...], "norm": [...], "start": state, "end": state}."""

    def __init__(self, path: str):
        self.path, self.losses, self.norms = Path(path), [], []

    def on_train_start(self, trainer, module) -> None:
        self.start = state(module)

    def on_before_backward(self, trainer, module, loss) -> None:
        self.losses.append(loss.detach().double())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.norms += [value.double() for name, value in module._row.items() if "gradient_norm" in name]

    def on_train_end(self, trainer, module) -> None:
        losses = sum_over_ranks(torch.stack(self.losses))[0] / world_size()  # DDP averages gradients
        end = state(module)
        if trainer.is_global_zero:
            torch.save({"loss": losses, "norm": torch.stack(self.norms), "start": self.start, "end": end}, self.path)


def state(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in whole(module.state_dict()).items() if value.is_floating_point()}


def work(args: argparse.Namespace) -> None:
    """On one of the ranks of a layout: train what is not there yet."""
    strategy, ranks = args.layout.split("-")[0], world_size_of(args.layout)
    for name in args.experiments:
        path = args.output / args.layout / f"{name}.pt"
        if path.is_file():
            continue
        experiment, _, more = name.partition("+")
        more = WITH_DISCRIMINATOR[experiment] if more else []
        train(
            bare(
                experiment, *more, f"trainer.devices={ranks}", *STRATEGIES[strategy],
                f"data.batch_size={args.images // ranks}", "data.num_workers=0",
                f"trainer.max_steps={args.steps}", "trainer.limit_val_batches=0",
                f"trainer.precision={args.precision}", f"output_dir={args.output / 'run'}", *args.override,
                "+callbacks.record={_target_:__main__.Record}", f"+callbacks.record.path={path}",
            )
        )  # fmt: skip
        torch.distributed.barrier() if ranks > 1 else None
    leave()


def world_size_of(layout: str) -> int:
    return int(layout.split("-")[1])


def differences(path: Path, reference: Path) -> dict[str, float]:
    """The largest of the losses and norms of any step, and those of all weights and of their change."""
    ours, theirs = (torch.load(file, weights_only=True) for file in (path, reference))
    found = {}
    for name in ("loss", "norm"):
        a, b = ours[name], theirs[name]
        if a.shape != b.shape:
            raise SystemExit(f"{path} has {len(a)} values of {name} and {reference} {len(b)}; remove one of them.")
        found[name] = ((a - b).abs() / b.abs().clamp(min=1e-12)).max().item()
    a, b, start = (flat(ours["end"]), flat(theirs["end"]), flat(theirs["start"]))
    found["weights"] = ((a - b).norm() / b.norm()).item()
    found["update"] = ((a - b).norm() / (b - start).norm()).item()
    return found


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


def launch(layout: str, args: argparse.Namespace) -> None:
    """The ranks of a layout, in processes of their own; raises when one fails."""
    (args.output / layout).mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size_of(layout)}",
        __file__, *args.experiments, "--layout", layout, "--steps", str(args.steps), "--images", str(args.images),
        "--output", str(args.output), "--precision", args.precision, "--override", *args.override,
    ]  # fmt: skip
    log = args.output / f"{layout}.log"
    with log.open("w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        )
    if done.returncode:
        raise SystemExit(f"{layout} failed; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-30:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help="default: every tiny one")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=8, help="of a batch, over all ranks")
    parser.add_argument("--precision", default="32-true", help="64-true tells rounding from error")
    parser.add_argument("--override", nargs="*", default=[], help="of every training")
    parser.add_argument("--output", type=Path, help="folder for results, kept between calls; default: a temporary one")
    parser.add_argument("--write", type=Path, help="a page that receives the table")
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.experiments = args.experiments or [*experiments(), *(f"{name}+discriminator" for name in WITH_DISCRIMINATOR)]
    if args.layout:
        return work(args)
    with tempfile.TemporaryDirectory() as folder:
        args.output = (args.output or Path(folder)).absolute()
        with Progress(transient=True) as progress:
            for layout in progress.track(["one-1", *args.layouts], description="layouts"):
                launch(layout, args)
        found = {
            name: {
                layout: differences(args.output / layout / f"{name}.pt", args.output / "one-1" / f"{name}.pt")
                for layout in args.layouts
            }
            for name in args.experiments
        }
        (args.output / "scaling.json").write_text(json.dumps(found, indent=1))
    show(found, args)
    return None


def show(found: dict[str, dict[str, dict[str, float]]], args: argparse.Namespace) -> None:
    rows = [
        [name, *(", ".join(f"{layouts[layout][measure]:.0e}" for measure in MEASURES) for layout in args.layouts)]
        for name, layouts in found.items()
    ]
    what = ", ".join(MEASURES.values())
    table = Table("", *args.layouts, title=f"relative to one rank, {args.steps} steps of {args.images} images: {what}")
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    if args.write:
        write_table(args.write, f"scaling in {args.precision}", ["experiment", *args.layouts], rows)


if __name__ == "__main__":
    main()
