"""Names of the zoo: which there are, and how a name becomes a tokenizer."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.util
import json
import pkgutil
from dataclasses import replace
from pathlib import Path

import torch

from zoo import weights as files
from zoo.errors import ZooError, nearest
from zoo.tokenizer import Preset, Tokenizer, config_fields, make_config

_registered: dict[str, Preset] = {}


@functools.cache
def _shipped() -> dict[str, Preset]:
    import zoo.tokenizers

    presets: dict[str, Preset] = {}
    for folder in pkgutil.iter_modules(zoo.tokenizers.__path__, "zoo.tokenizers."):
        if importlib.util.find_spec(f"{folder.name}.tokenizer"):
            presets |= importlib.import_module(f"{folder.name}.tokenizer").PRESETS
    return presets


def presets() -> dict[str, Preset]:
    """Every name: PRESETS of each folder under zoo/tokenizers, and what register_tokenizer added."""
    return _shipped() | _registered


def register_tokenizer(name: str, preset: Preset) -> None:
    """Add a name from outside the package. Raises ZooError when it is taken."""
    if name in presets():
        raise ZooError(f"the name '{name}' is taken; choose another.")
    _registered[name] = preset


def preset(name: str) -> Preset:
    """The preset of a name. Raises ZooError with the nearest names."""
    known = presets()
    if name not in known:
        raise ZooError(f"no tokenizer is called '{name}'{nearest(str(name), known)}")
    return known[name]


def resource(folder: str) -> Path:
    """Path of conf/ or checkpoints/: inside an installed package, at the root of a checkout."""
    package = Path(__file__).parent
    return next((p for p in (package / folder, package.parent / folder) if p.is_dir()), package / folder)


def has_weights(preset: Preset) -> bool:
    """Whether a program can load weights by the name alone: shipped with the package, or on a hub."""
    location = preset.weights and preset.weights.location
    return bool(location) and (location.startswith("hf://") or (resource("checkpoints") / location).is_file())


def list_tokenizers(pattern: str = "*", pretrained: bool | None = None) -> list[str]:
    """Sorted names that match a pattern such as "karl*"; pretrained=True: only those that load by name alone."""
    return sorted(
        name
        for name, preset in presets().items()
        if fnmatch.fnmatch(name, pattern) and pretrained in (None, has_weights(preset))
    )


def create_tokenizer(name: str, **overrides) -> Tokenizer:
    """An untrained tokenizer with any field of its preset's configuration overridden, in training mode."""
    chosen = preset(name)
    tokenizer = chosen.tokenizer(make_config(chosen.config, overrides))
    tokenizer.info = replace(tokenizer.info, name=name, licence=chosen.licence)
    return tokenizer


def load_tokenizer(
    name: str,
    weights: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides,
) -> Tokenizer:
    """A tokenizer with its weights, in evaluation mode.

    Args:
        name: a name of list_tokenizers().
        weights: a file instead of the registered one: a path or "hf://owner/name/file". Files of save_tokenizer and
            of training, and the authors' own, whose names are converted.
        device, dtype: as in torch.
        overrides: fields of the configuration. They go before those stored in a file of save_tokenizer, which go
            before the preset's.

    Raises:
        ZooError: the name is unknown, the file cannot be had, or what is in it does not fit, by name.
    """
    chosen, path = preset(name), weights_path(name, weights)
    state, metadata = files.read(path)
    system = chosen.tokenizer.__module__.rsplit(".", 1)[0]
    if "zoo" in metadata:
        stored = json.loads(metadata["zoo"])
        if stored["system"] != system.rsplit(".", 1)[-1]:
            raise ZooError(f"{path} holds a tokenizer of the system '{stored['system']}', and {name} is of another.")
        overrides = stored["config"] | overrides
    tokenizer = create_tokenizer(name, **overrides)
    if "zoo" not in metadata and not state.keys() <= tokenizer.state_dict().keys():
        published = importlib.import_module(f"{system}.published")
        state = published.from_published(state, tokenizer.config)
    files.load(tokenizer, state, path)
    return tokenizer.to(device=device, dtype=dtype).eval()


def weights_path(name: str, weights: str | Path | None = None) -> Path:
    """The file that load_tokenizer reads for these arguments, downloaded if need be."""
    registered = preset(name).weights
    if weights is None and registered is None:
        raise ZooError(f"no weights are published for {name}; train it, or pass weights='path/to/a/file'.")
    if weights is None and registered.location and not registered.location.startswith("hf://"):
        registered = replace(registered, location=str(resource("checkpoints") / registered.location))
    return files.locate(registered if weights is None else weights, name)


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer as one safetensors file that load_tokenizer(name, weights=path) reads, sizes included."""
    system = type(tokenizer).__module__.split(".")[-2]
    about = {"name": tokenizer.info.name, "system": system, "config": config_fields(tokenizer.config)}
    files.save(path, tokenizer.state_dict(), about)
