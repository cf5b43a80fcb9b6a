"""Does a long training grow? The memory of every tiny experiment over 2,000 steps, with data workers and validation.

Each experiment (or those named) runs in a process of its own with two data workers, in epochs of 500 batches of 2
images. Every 10 steps the memory of the process and its workers is read (PSS: shared pages count once; Linux), while
glibc gives back what is free. A line is fitted to the last half, and its slope stands beside its standard error.

    python benchmarks/memory_over_time.py                           # all; what is in --output is kept
    python benchmarks/memory_over_time.py vqgan-tiny --steps 400
    python benchmarks/memory_over_time.py --write docs/scaling.md
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
import numpy as np
from _runs import bare, experiments, write_table
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from zoo.commands.train import train
from zoo.files import write_json

EVERY = 10
PLAIN = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of a training: glibc gives freed memory back, so that what stays is in use."""
HEADER = ["experiment", "MiB at the first step", "at the last", "MiB in 1,000 steps, last half", "standard error"]


class Memory(L.Callback):
    """Writes [[step, MiB of the process and its children], ...] to a file."""

    def __init__(self, path: str):
        self.path, self.found = Path(path), []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % EVERY == 0:
            self.found.append([trainer.global_step, sum(map(mebibytes, family(os.getpid())))])

    def on_train_end(self, trainer, module) -> None:
        write_json(self.path, self.found)


def family(process: int) -> list[int]:
    """The process and its children, theirs included."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(member for child in children for member in family(int(child)))]


def mebibytes(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def slope(found: list[list[float]]) -> tuple[float, float]:
    """MiB in 1,000 steps over the last half, and its standard error."""
    steps, memory = np.array(found[len(found) // 2 :]).T
    (rate, _), covariance = np.polyfit(steps / 1000, memory, 1, cov=True)
    return rate, covariance[0, 0] ** 0.5


def work(name: str, path: Path, steps: int) -> None:
    train(
        bare(
            name, f"trainer.max_steps={steps}", "trainer.limit_train_batches=500", "trainer.limit_val_batches=1",
            "data.batch_size=2", "data.num_workers=2", f"output_dir={path.parent / 'run'}",
            "+callbacks.memory={_target_:__main__.Memory}", f"+callbacks.memory.path={path}",
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help="default: every tiny one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="folder for results, kept between calls; default: a temporary one")
    parser.add_argument("--write", type=Path, help="a page that receives the table")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.experiments or experiments()
    if args.work:
        return work(names[0], args.work, args.steps)
    with tempfile.TemporaryDirectory() as folder, Progress(transient=True) as progress:
        output = (args.output or Path(folder)).absolute()
        output.mkdir(parents=True, exist_ok=True)
        for name in progress.track(names, description="experiments"):
            path = output / f"{name}.json"
            if not path.is_file():
                command = [sys.executable, __file__, name, "--work", str(path), "--steps", str(args.steps)]
                with (output / f"{name}.log").open("w") as log:
                    subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | PLAIN, check=True)
        found = {name: json.loads((output / f"{name}.json").read_text()) for name in names}
    rows = []
    for name, memory in found.items():
        rate, error = slope(memory)
        rows.append([name, f"{memory[0][1]:.0f}", f"{memory[-1][1]:.0f}", f"{rate:+.2f}", f"{error:.2f}"])
    table = Table(*HEADER, title=f"{args.steps} steps")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    if args.write:
        write_table(args.write, "memory over time", HEADER, rows)
    return None


if __name__ == "__main__":
    main()
