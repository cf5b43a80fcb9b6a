"""Do bfloat16 and float16 reach the loss of float32? Every tiny experiment, 200 steps in each, on the CPU.

    python benchmarks/precision.py                                  # all; what is in --output is kept
    python benchmarks/precision.py vqgan-tiny --steps 50
    python benchmarks/precision.py --write docs/precision.md

A run is `zoo train` from nothing with the same seed, and so with the same weights, batches and random numbers, on
small batches. Compared is the total loss of what is trained (`train/loss`), the mean over the last
steps. Where half precision is worse by more than the bound, a second run in float32, from weights that were moved by a
thousandth, says how far apart losses get that differ by chance alone.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from _runs import bare, experiments, write_table
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from zoo.commands.train import train
from zoo.errors import ZooError
from zoo.files import write_json
from zoo.training.callbacks import read_rows
from zoo.training.module import TrainingModule

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed", "moved": "32-true"}
HEADER = "experiment", "first steps", "float32", "bfloat16", "float16", "skipped in float16", "moved"
LAST = 20
"""Steps over which the loss is averaged."""
BOUND = 0.05

ATEN = torch.ops.aten
ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu.default
SLOW = {
    ATEN.convolution_backward.default,
    ATEN.bmm.default,
    ATEN.baddbmm.default,
    ATEN.mm.default,
    ATEN.addmm.default,
    ATTENTION,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
"""Products, whose kernels for float16 are slow on the CPU."""


class WideProducts(TorchDispatchMode):
    """Products of float16 tensors summed in float32 and rounded to float16, as a GPU does it.

    With the kernels of the CPU a backward pass of a convolution takes 100 times as long.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in SLOW or all(t.dtype != torch.half for t in args if isinstance(t, torch.Tensor)):
            return function(*args, **kwargs)
        wide = tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype == torch.half else t, (args, kwargs))
        half = function(*wide[0], **wide[1])
        if function is ATTENTION:
            return half[0].half(), half[1]  # the logarithms of the sums stay as they are
        return tree_map_only(torch.Tensor, torch.Tensor.half, half)


@contextmanager
def moved_weights() -> Iterator[None]:
    """Trainings begin with weights that differ by a thousandth, less than half of what bfloat16 rounds away."""
    configure = TrainingModule.configure_optimizers

    def move_and_configure(module: TrainingModule):
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter *= 1 + 1e-3 * torch.randn(parameter.shape, generator=draws)
        return configure(module)

    TrainingModule.configure_optimizers = move_and_configure
    try:
        yield
    finally:
        TrainingModule.configure_optimizers = configure


def measure(name: str, precision: str, folder: Path, args: argparse.Namespace) -> dict:
    """Losses, skipped steps and seconds of a run."""
    overrides = [
        f"trainer.max_steps={args.steps}", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=0",
        f"trainer.precision={PRECISIONS[precision]}", f"output_dir={folder}",
        f"data.batch_size={args.images}",
    ]  # fmt: skip
    mode = {"float16": WideProducts(), "moved": moved_weights()}.get(precision, nullcontext())
    begin = time.perf_counter()
    with mode:
        train(bare(name, *overrides))
    rows = [row for row in read_rows(folder / "metrics.csv") if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in rows]
    if len(losses) != args.steps:
        raise ZooError(f"{folder} has {len(losses)} losses, expected {args.steps}.")
    return {
        "loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "first_loss": sum(losses[:LAST]) / len(losses[:LAST]),
        "skipped_steps": int(float(rows[-1]["train/skipped_steps"])),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def excess(runs: dict[str, dict], precision: str) -> float:
    """By how much the last loss is above that of float32, as a share of its size."""
    exact = runs["float32"]["loss"]
    return (runs[precision]["loss"] - exact) / abs(exact)


def wanted(runs: dict[str, dict]) -> list[str]:
    """The runs of an experiment that are to be made next."""
    missing = [precision for precision in PRECISIONS if precision not in runs and precision != "moved"]
    if not missing and "moved" not in runs and max(excess(runs, "bfloat16"), excess(runs, "float16")) > BOUND:
        missing = ["moved"]
    return missing


def line(name: str, runs: dict[str, dict]) -> list[str]:
    cells = [
        f"{share:+.1%}{' (!)' if share > BOUND and precision != 'moved' else ''}" if share is not None else ""
        for precision in ("bfloat16", "float16", "moved")
        for share in [excess(runs, precision) if precision in runs else None]
    ]
    exact = runs["float32"]
    skipped = str(runs["float16"]["skipped_steps"])
    return [name, f"{exact['first_loss']:.4f}", f"{exact['loss']:.4f}", *cells[:2], skipped, cells[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help="default: every tiny one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=4, help="of a batch")
    parser.add_argument("--output", type=Path, help="folder for results, kept between calls; default: a temporary one")
    parser.add_argument("--write", type=Path, help="a page that receives the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names, console = args.experiments or experiments(), Console(width=120)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        output = (args.output or Path(folder)).absolute()
        file, settings = output / "precision.json", {"steps": args.steps, "images": args.images}
        found = json.loads(file.read_text()) if file.is_file() else settings | {"results": {}}
        if {name: found[name] for name in settings} != settings:
            raise SystemExit(f"{file} is of other settings than {settings}; choose another --output.")
        for name in progress.track(names, description="experiments"):
            runs = found["results"].setdefault(name, {})
            while missing := wanted(runs):
                runs[missing[0]] = measure(name, missing[0], output / f"{name}-{missing[0]}", args)
                console.print(name, missing[0], runs[missing[0]])
                write_json(file, found)
    rows = [line(name, found["results"][name]) for name in names]
    table = Table(*HEADER, title=f"loss after {args.steps} steps, mean of the last {LAST}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if args.write:
        write_table(args.write, "precision", list(HEADER), rows)


if __name__ == "__main__":
    main()
