"""What the commands that measure or write much share: devices, folders, protocols, tables, checks of fields."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import ParallelStrategy
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from zoo.errors import ZooError, nearest, one_line, shortened
from zoo.files import write_json
from zoo.metrics.base import Row
from zoo.tokenizer import Tokenizer
from zoo.weights import sha256_of

ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
COLUMNS = 4
"""Rows of the report side by side in one table, which then fits 100 characters."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def start(cfg: DictConfig) -> Fabric:
    """Lightning Fabric on cfg.device, cfg.devices, cfg.num_nodes and cfg.strategy, launched.

    Raises ZooError where they do not fit each other, or what torchrun or srun has started.
    """
    try:
        fabric = Fabric(accelerator=cfg.device, devices=cfg.devices, num_nodes=cfg.num_nodes, strategy=cfg.strategy)
        strategy = fabric.strategy
        expect_started(len(strategy.parallel_devices) if isinstance(strategy, ParallelStrategy) else 1, cfg.num_nodes)
        fabric.launch()
    except ZooError:
        raise
    except Exception as error:  # of Lightning and torch, for what they do not know
        asked = " ".join(f"{name}={cfg[name]}" for name in ("device", "devices", "num_nodes", "strategy"))
        raise ZooError(f"{asked} are not possible here ({one_line(error)}).") from error
    return fabric


def expect_started(devices: int, num_nodes: int) -> None:
    """Raise ZooError where torchrun or srun has started another number of processes than `devices` on each node."""
    launcher, started = started_by()
    if launcher and started != devices * num_nodes:
        raise ZooError(
            f"{launcher} started {started} process{'es' * (started > 1)}, which devices={devices} on each of "
            f"num_nodes={num_nodes} are not; say how many it started (zoo train: trainer.devices, trainer.num_nodes)."
        )


def started_by() -> tuple[str | None, int]:
    """Who has started this process, if not a person or Lightning, and how many like it."""
    if TorchElasticEnvironment.detect():  # first, as it may have been started by srun
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect():
        tasks = int(os.environ["SLURM_NTASKS"])
        if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ZooError(f"SLURM started {tasks} tasks with --ntasks; say --ntasks-per-node instead.")
        return "SLURM", tasks
    return None, 1


def seed_of(seed: int, number: int) -> int:
    """For random numbers that are a function of a seed and the number of what they are for."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def claim(fabric: Fabric, folder: Path, protocol: dict) -> None:
    """Make the folder for results of a protocol, or see that what is in it was begun with the same.

    Raises ZooError, on every rank, when it was another.
    """
    path = folder / "protocol.json"
    if fabric.is_global_zero and not path.is_file():
        write_json(path, protocol)
    fabric.barrier()
    begun = json.loads(path.read_text())
    if begun != json.loads(json.dumps(protocol)):
        differ = ", ".join(sorted(k for k in begun.keys() | protocol.keys() if begun.get(k) != protocol.get(k)))
        raise ZooError(
            f"{folder} was begun with another {differ}; choose another output_dir, or delete it (see protocol.json)."
        )


def decisive(source: dict) -> dict:
    """Of the data of a run what can change numbers, for a protocol."""
    return {name: value for name, value in source.items() if name != "num_workers"}


def preparation(source: dict) -> dict:
    """What is done with images, for a protocol; source: the data of the run."""
    how = f"{source.get('interpolation', 'bicubic')} with antialiasing"
    if source.get("crop") == "squash":
        return {"resize": f"both sides to data.image_size, {how}", "crop": "none"}
    return {"resize": f"shorter side to data.image_size, {how} (depth: nearest)", "crop": "center"}


def about_file(path: Path) -> dict:
    return {"file": path.name, "sha256": sha256_of(path)}


def about_rows(rows: Iterable[Row]) -> dict:
    return {row.name: {"title": row.title, "better": row.better, "format": row.format} for row in rows}


def about_the_run(fabric: Fabric) -> dict:
    cuda = fabric.device.type == "cuda"
    packages = {"torch": "torch", "zoo": "tokenizer-zoo", "torchmetrics": "torchmetrics", "lightning": "lightning"}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name(fabric.device) if cuda else f"{fabric.device.type} {platform.machine()}",
        "devices": fabric.world_size,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(p) for name, p in packages.items()},
    }


def table(title: str, entries: list[dict], rows: Mapping[str, Row]) -> Table:
    """One line for each measure, one column for each row of the report; the best of a line is bold."""
    table = Table(title=title)
    table.add_column("")
    for entry in entries:
        table.add_column(label(entry["name"], entry["settings"]), justify="right")
    for row in rows.values():
        values = [entry["metrics"].get(row.name) for entry in entries]
        known = [value for value in values if value is not None]
        best = {"higher": max, "lower": min}[row.better](known) if row.better and len(known) > 1 else None
        cells = []
        for entry, value in zip(entries, values, strict=True):
            if value is None:
                cells.append("missing" if row.name in entry["missing"] else "")
            else:
                cells.append(f"[bold]{value:{row.format}}[/]" if value == best else f"{value:{row.format}}")
        table.add_row(row.title.replace("[", r"\[") + ARROWS[row.better], *cells)
    return table


def label(name: str, settings: dict) -> str:
    return "\n".join([name, *(f"{setting} {value}" for setting, value in settings.items())])


def expect_one_of(cfg: DictConfig, name: str, known: Iterable) -> None:
    if cfg[name] not in tuple(known):
        raise ZooError(f"{name} must be one of {', '.join(map(str, known))}, got {shortened(cfg[name])}.")


def combinations(encode: DictConfig, tokenizer: Tokenizer) -> list[dict]:
    """Every combination of the settings of encode, whose lists stand for several values."""
    settings = OmegaConf.to_container(encode, resolve=True)
    known = list(inspect.signature(tokenizer._encode).parameters)[1:]
    for name in settings:
        if name not in known:
            raise ZooError(f"{tokenizer.info.name} has no setting encode.{name}{nearest(name, known)}")
    values = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [dict(zip(settings, chosen, strict=True)) for chosen in itertools.product(*values)]
