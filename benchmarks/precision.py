"""Do bfloat16 and float16 reach the loss of float32? Every tiny experiment, 200 steps in each, on the CPU.

    python benchmarks/precision.py [EXPERIMENT ...] [--steps 200] [--share 0.5] [--folder outputs/precision] [--table]

A run is `zoo train` with the same seed, and so with the same weights, batches and random numbers, at a share of the
experiment's batch. Compared is the total loss of what is trained (`train/loss`), the mean over the last 20 steps.
Stages that go on from an earlier one start from the checkpoint of their tokenizer in this repository where it fits,
else from nothing. A second run in float32, from weights that were moved by a thousandth, says how far apart losses get
that differ by chance alone. Runs that FOLDER/precision.json has are not made again. Without names the table of all
experiments that have all their runs goes to docs/precision.md; --table makes it of the runs that are there.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import zoo
from zoo.commands import cli
from zoo.commands.train import train
from zoo.errors import ZooError
from zoo.files import write_json, writing
from zoo.registry import resource
from zoo.training.callbacks import read_rows
from zoo.training.module import TrainingModule

PRECISIONS = {"float32": "32-true", "moved": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
LAST = 20
"""Steps over which the loss is averaged."""
BOUND = 0.05
QUIET = ("checkpoint", "best", "pictures", "progress", "ema")
DOCUMENT = Path(__file__).parents[1] / "docs" / "precision.md"
BEGIN, END = "<!-- table of benchmarks/precision.py -->\n", "<!-- end -->\n"

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


def experiments() -> list[str]:
    return sorted(path.stem for path in (resource("conf") / "experiment").glob("*tiny*.yaml"))


def prepared(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Overrides of zoo train for a short and quiet run of an experiment."""
    overrides = [f"experiment={name}", *(f"callbacks.{callback}=null" for callback in QUIET)]
    overrides += [f"trainer.max_steps={options.steps}", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=0"]
    overrides += ["+trainer.enable_checkpointing=false"]
    cfg = cli.compose("train", overrides)
    overrides += [f"data.batch_size={max(2, round(options.share * cfg.data.batch_size))}"]
    if cfg.needs_weights:
        overrides += [f"weights={shipped(cfg)}" if shipped(cfg) else "needs_weights=false"]
    if "start" in cfg.module and cfg.module.lm is None:
        overrides += [f"module.start={language_model(cfg.tokenizer.name, folder, options)}"]
    return overrides


def shipped(cfg: DictConfig) -> Path | None:
    """The checkpoint of this repository that a stage can go on from."""
    path = resource("checkpoints") / f"{cfg.tokenizer.name}.safetensors"
    try:
        zoo.load_tokenizer(cfg.tokenizer.name, path, fresh=cfg.fresh, **cli.changed_fields(cfg.tokenizer))
    except ZooError:
        return None
    return path


def language_model(tokenizer: str, folder: Path, options: argparse.Namespace) -> Path:
    """What ett-tiny and its kin go on from, made where it is not there yet."""
    output = folder / f"alignment-{tokenizer}"
    if not (output / "model").is_dir():
        overrides = [*prepared("ett-tiny-alignment", folder, options), f"tokenizer={tokenizer}"]
        train(cli.compose("train", [*overrides, f"output_dir={output}"]))
    return output / "model"


def measure(name: str, precision: str, folder: Path, options: argparse.Namespace) -> dict:
    """Losses, skipped steps and seconds of a run."""
    output, begin = folder / f"{name}-{precision}", time.perf_counter()
    overrides = [f"trainer.precision={PRECISIONS[precision]}", f"output_dir={output}"]
    mode = {"float16": WideProducts(), "moved": moved_weights()}.get(precision, nullcontext())
    with mode:
        train(cli.compose("train", [*prepared(name, folder, options), *overrides]))
    rows = [row for row in read_rows(output / "metrics.csv") if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in rows]
    if len(losses) != options.steps:
        raise ZooError(f"{output} has {len(losses)} losses, expected {options.steps}; remove it and start again.")
    return {
        "loss": sum(losses[-LAST:]) / LAST,
        "first_loss": sum(losses[:LAST]) / LAST,
        "skipped_steps": int(float(rows[-1]["train/skipped_steps"])),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def lines(results: dict) -> list[list[str]]:
    """A line of the table for each experiment that has all runs."""
    table = []
    for name, runs in sorted(results.items()):
        if runs.keys() != PRECISIONS.keys():
            continue
        exact = runs["float32"]
        line = [name, f"{exact['first_loss']:.4f}", f"{exact['loss']:.4f}"]
        for precision in ("moved", "bfloat16", "float16"):
            excess = (runs[precision]["loss"] - exact["loss"]) / abs(exact["loss"])
            line.append(f"{excess:+.1%}{' (!)' if excess > BOUND else ''}")
        table.append([*line, str(runs["float16"]["skipped_steps"])])
    return table


HEADER = "experiment", "first 20", "float32", "moved", "bfloat16", "float16", "skipped in float16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all of them")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.5, help="of the batch of the experiment")
    parser.add_argument("--folder", type=Path, default=Path("outputs/precision"))
    parser.add_argument("--table", action="store_true", help="only of the runs that are there")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder, file = options.folder.absolute(), options.folder / "precision.json"
    settings = {"steps": options.steps, "share": options.share}
    found = json.loads(file.read_text()) if file.is_file() else settings | {"results": {}}
    if {name: found[name] for name in settings} != settings:
        raise ZooError(f"{file} is of other settings than {settings}; choose another --folder.")
    results = found["results"]
    wanted = [] if options.table else options.experiments or experiments()
    console = Console(width=120)
    with Progress(console=console) as progress:
        runs = [(name, precision) for name in wanted for precision in PRECISIONS]
        for name, precision in progress.track(runs, description="runs"):
            if precision in results.setdefault(name, {}):
                continue
            results[name][precision] = measure(name, precision, folder, options)
            console.print(name, precision, results[name][precision])
            write_json(file, found | {"results": results})

    table = Table(*HEADER, title=f"loss after {options.steps} steps, mean of the last {LAST}")
    for line in lines(results):
        table.add_row(*line)
    console.print(table)
    if not options.experiments:
        rows = [HEADER, ["---"] * len(HEADER), *lines(results)]
        markdown = "".join("| " + " | ".join(row) + " |\n" for row in rows)
        missing = [name for name in experiments() if name not in {row[0] for row in rows}]
        markdown += f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
        before, rest = DOCUMENT.read_text().split(BEGIN)
        with writing(DOCUMENT) as document:
            document.write(f"{before}{BEGIN}{markdown}{END}{rest.split(END)[1]}".encode())


if __name__ == "__main__":
    main()
