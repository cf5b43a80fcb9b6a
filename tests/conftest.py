import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# Several test processes share two cores: more threads each are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


tried = Counter()
"""Cases that each test of tests/fuzz has tried, in all processes."""


def pytest_addoption(parser):
    parser.addoption(
        "--vectors",
        metavar="DIR",
        help="run the reference tests over DIR/<system>/golden-*.json in addition to the repository's own",
    )
    parser.addoption(
        "--fuzz-examples",
        metavar="N",
        type=int,
        default=10,
        help="cases that each test of tests/fuzz tries (default: 10); the same N gives the same cases",
    )


def pytest_sessionfinish(session):
    if "fuzz_helpers" in sys.modules and hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["tried"] = dict(sys.modules["fuzz_helpers"].tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    tried.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter):
    if "fuzz_helpers" in sys.modules:
        tried.update(sys.modules["fuzz_helpers"].tried)
    if tried:
        terminalreporter.section("fuzzing")
        for test, count in sorted(tried.items()):
            terminalreporter.write_line(f"{count:8,}  {test}")
        terminalreporter.write_line(f"{sum(tried.values()):8,}  cases tried")


@pytest.fixture
def watch():
    """A callback of Lightning; watch.moved has, for each batch, the parts of the module whose parameters changed."""
    import lightning as L
    import torch

    class Watch(L.Callback):
        moved = ()

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.before = {name: p.detach().clone() for name, p in module.named_parameters()}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            changed = [n for n, p in module.named_parameters() if not torch.equal(p, self.before[n])]
            self.moved = [*self.moved, {name.split(".")[0] for name in changed}]

    return Watch()


def zoo_command(command, *overrides):
    """The true command in a process of its own, which starts the other ranks; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "zoo", command, *overrides],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(name="zoo_command", scope="session")
def zoo_command_fixture():
    return zoo_command


@pytest.fixture(scope="session")
def train_on():
    """Train on some ranks with a batch of 8 over all of them; returns {name: logged values}."""

    def train(ranks, folder, experiment, *overrides):
        ddp = ["trainer.strategy=ddp_find_unused_parameters_true"] if ranks > 1 else []
        options = ["trainer=tiny-debug", f"trainer.devices={ranks}", f"data.batch_size={8 // ranks}", *ddp]
        zoo_command("train", f"experiment={experiment}", *options, f"output_dir={folder}", *overrides)
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}

    return train
