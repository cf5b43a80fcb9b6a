"""Reading reference vectors (schema 1): weights and inputs are functions of their names, answers are stored."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


def uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [-1, 1): the top 40 bits of splitmix64 at counter (crc32(key) << 32) + index + 1, over 2^24."""
    mask = (1 << 64) - 1
    counter = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(((zlib.crc32(key.encode()) << 32) + 1) & mask)
    with np.errstate(over="ignore"):
        z = counter * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)) / 2.0**23 - 1).reshape(shape)


def weight(key: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """float32 parameter of that name: norm weights near 1, biases near 0, others by their fan-in."""
    values = uniform(key, shape)
    if len(shape) == 1:
        values = 0.1 * values + (key.split(".")[-1] in ("weight", "gamma", "scale"))
    elif shape[0] == 1 and len(shape) > 2:
        values = 0.35 * values
    else:
        values = values * np.sqrt(3 * shape[0] / values.size)
    return torch.from_numpy((values * scale).astype(np.float32))


def image(key: str, shape: tuple[int, ...]) -> Tensor:
    """float32 test image in [0, 1): three waves per channel and a little noise."""
    batch, channels, height, width = shape
    a, b, c, d = np.moveaxis(uniform(f"{key}/phase", (batch, channels, 4)), -1, 0)[..., None, None]
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    turn = 2 * np.pi
    waves = np.sin(turn * (2 * x + a)) + np.cos(turn * (3 * y + b)) + np.sin(turn * (5 * (x + y) * c + d))
    values = 0.5 + waves / 8 + 0.1 * uniform(f"{key}/noise", shape)
    return torch.from_numpy(values.clip(0, 1 - 2.0**-24).astype(np.float32))


FILLS = {"image": image, "uniform": lambda key, shape: torch.from_numpy(uniform(key, shape)).float()}


class Vectors:
    """One golden file: its modules, cases, inputs and answers."""

    def __init__(self, path: Path):
        self.path, self.system = path, path.parent.name
        content = json.loads(path.read_text())
        if content.get("schema") != 1:
            raise ValueError(f"{path} has schema {content.get('schema')}, these tests read schema 1")
        self.modules, self.inputs = content["modules"], content.get("inputs", {})
        self.cases = {case["name"]: case for case in content["cases"]}
        self._tensors = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = load_file(self.path.with_suffix(".safetensors"))
        return self._tensors

    def input(self, case: str, name: str) -> Tensor | None:
        """An input that is stored, or described as scale * fill(key, shape) + shift; None when the case has none."""
        key = f"{case}/{name}"
        if f"input/{key}" in self.tensors:
            return self.tensors[f"input/{key}"]
        about = self.inputs.get(key)
        if not isinstance(about, dict) or "fill" not in about:
            return None
        values = FILLS[about["fill"]](about["key"], tuple(about["shape"]))
        return values * about.get("scale", 1) + about.get("shift", 0)

    def answers(self, case: str) -> dict[str, Tensor]:
        prefix = f"output/{case}/"
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def orphans(self) -> list[str]:
        """Stored answers that belong to no case, and so would never be compared."""
        with safe_open(self.path.with_suffix(".safetensors"), "pt") as file:
            stored = [name for name in file.keys() if name.startswith("output/")]  # noqa: SIM118
        return [name for name in stored if name.split("/")[1] not in self.cases]

    def state(self, module: str) -> dict[str, Tensor]:
        """The authors' state dict of a module; entries that are neither filled nor stored are left out."""
        about = self.modules[module]
        skip, scales = set(about.get("skip", ())), about.get("scales", {})
        state = {}
        for name, shape, _, kind in about["keys"]:
            stored = self.tensors.get(f"weight/{module}/{name}")
            if stored is not None:
                state[name] = stored
            elif kind == "fill" and name not in skip:
                state[name] = weight(name, tuple(shape), scales.get(name, 1.0))
        return state


def part(tensor: Tensor, meaning: str) -> Tensor:
    """The stored part of an output whose description ends in `STRIDED: [[start, stop, step], ...]`."""
    _, found, slices = meaning.rpartition("STRIDED:")
    if not found:
        return tensor
    bounds = json.loads(slices)
    return tensor[tuple(slice(*b) if b else slice(None) for b in bounds)]
