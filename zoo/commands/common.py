"""What the commands that measure or write much share: devices, resumable folders, protocols, checks of fields."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig

from zoo.errors import ZooError
from zoo.weights import sha256_of

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
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(".protocol.json.part")
        part.write_text(json.dumps(protocol, indent=2) + "\n")
        part.replace(path)
    fabric.barrier()
    begun = json.loads(path.read_text())
    if begun != json.loads(json.dumps(protocol)):
        differ = ", ".join(sorted(k for k in begun.keys() | protocol.keys() if begun.get(k) != protocol.get(k)))
        raise ZooError(f"{folder} was begun with another {differ}; choose another output_dir (see protocol.json).")


def about_file(path: Path) -> dict:
    return {"file": path.name, "sha256": sha256_of(path)}


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


def expect_one_of(cfg: DictConfig, name: str, known: Iterable) -> None:
    if cfg[name] not in known:
        raise ZooError(f"{name} must be one of {', '.join(map(str, known))}, got {cfg[name]!r}.")


def expect_integer(cfg: DictConfig, name: str, least: int) -> None:
    if type(cfg[name]) is not int or cfg[name] < least:
        raise ZooError(f"{name} must be an integer of at least {least}, got {cfg[name]!r}.")
