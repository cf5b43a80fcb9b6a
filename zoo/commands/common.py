"""What the commands that measure or write much share: devices, folders, protocols, tables, checks of fields."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig
from rich.table import Table

from zoo.data import Loader
from zoo.errors import ZooError
from zoo.files import write_json
from zoo.metrics.base import Row
from zoo.weights import sha256_of

ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
COLUMNS = 4
"""Rows of the report side by side in one table, which then fits 100 characters."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def start(cfg: DictConfig) -> Fabric:
    """Lightning Fabric on cfg.device, cfg.devices and cfg.strategy, launched. Raises ZooError where they do not fit."""
    try:
        fabric = Fabric(accelerator=cfg.device, devices=cfg.devices, strategy=cfg.strategy)
    except (ValueError, TypeError) as error:
        raise ZooError(f"device={cfg.device} devices={cfg.devices} strategy={cfg.strategy}: {error}") from error
    fabric.launch()
    return fabric


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
        raise ZooError(f"{folder} was begun with another {differ}; choose another output_dir (see protocol.json).")


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


def limited(loader: Loader, limit: int) -> Iterator[dict]:
    """This rank's part of the first `limit` images of all ranks."""
    share = loader.dataset
    if share.total is None:
        raise ZooError("limit needs data whose number of images is known: a folder, or shards that are local files.")
    left = min(share.end, limit) - share.begin
    for batch in loader if left > 0 else ():
        yield {name: values[:left] for name, values in batch.items()}
        left -= len(batch["key"])
        if left <= 0:
            break


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
    if cfg[name] not in known:
        raise ZooError(f"{name} must be one of {', '.join(map(str, known))}, got {cfg[name]!r}.")


def expect_integer(cfg: DictConfig, name: str, least: int) -> None:
    if type(cfg[name]) is not int or cfg[name] < least:
        raise ZooError(f"{name} must be an integer of at least {least}, got {cfg[name]!r}.")
