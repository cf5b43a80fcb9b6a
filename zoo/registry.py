"""Names of the zoo: which there are, and how a name becomes a tokenizer, a generator, an encoder or a decoder."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from zoo import weights as files
from zoo.errors import ZooError, nearest, one_line, shortened
from zoo.tokenizer import Preset, Weights, config_fields, make_config


class Registry:
    """Names of one kind: "tokenizer", "generator", "encoder" or "decoder".

    A name is a Preset in the PRESETS of a file called like the kind, in any folder under zoo/tokenizers.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._shipped: dict[str, Preset] | None = None
        self._registered: dict[str, Preset] = {}

    def presets(self) -> dict[str, Preset]:
        """Every name: those of the package, and what `register` added."""
        if self._shipped is None:
            import zoo.tokenizers

            found: dict[str, Preset] = {}
            for folder in pkgutil.iter_modules(zoo.tokenizers.__path__, "zoo.tokenizers."):
                if importlib.util.find_spec(module := f"{folder.name}.{self.kind}"):
                    found |= importlib.import_module(module).PRESETS
            self._shipped = found
        return self._shipped | self._registered

    def register(self, name: str, preset: Preset) -> None:
        """Add a name from outside the package. Raises ZooError when it is taken."""
        if name in self.presets():
            raise ZooError(f"the name '{name}' is taken; choose another.")
        self._registered[name] = preset

    def preset(self, name: str) -> Preset:
        """The preset of a name. Raises ZooError with the nearest names."""
        known = self.presets()
        if not isinstance(name, str) or name not in known:
            name = shortened(name).strip("'")
            raise ZooError(f"no {self.kind} is called '{name}'{nearest(name, known)}")
        return known[name]

    def list(self, pattern: str = "*", pretrained: bool | None = None) -> list[str]:
        """Sorted names that match a pattern such as "karl*"; pretrained=True: only those that load by name alone."""
        return sorted(
            name
            for name, preset in self.presets().items()
            if fnmatch.fnmatch(name, pattern) and pretrained in (None, has_weights(preset))
        )

    def create(self, name: str, **overrides) -> Any:
        """An untrained one with any field of its preset's configuration overridden, in training mode."""
        return self._make(name, overrides)

    def _make(self, name: str, overrides: Mapping[str, Any]) -> Any:
        chosen = self.preset(name)
        try:
            made = chosen.tokenizer(make_config(chosen.config, overrides))
        except ZooError:
            raise
        except Exception as error:
            if not overrides:
                raise
            given = {key: value for key, value in overrides.items() if value != getattr(chosen.config, key)}
            raise ZooError(f"{name} cannot be made with {shortened(given, 300)} ({one_line(error)}).") from error
        made.info = replace(made.info, name=name, licence=chosen.licence)
        return made

    def load(
        self,
        name: str,
        weights: str | Path | Weights | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fresh: Sequence[str] = (),
        **overrides,
    ) -> Any:
        """One with its weights, in evaluation mode.

        Args:
            name: a name of `list`.
            weights: a file instead of the registered one: a path, "hf://owner/name/file" or, of a certain commit,
                "hf://owner/name@commit/file"; as `Weights` its SHA-256 is checked. Files of `save` and of training, and
                the authors' own, whose names are converted.
            device, dtype: as in torch.
            fresh: parts (attributes) that begin anew, whatever the file has of them, as a later stage of a training may
                want.
            overrides: fields of the configuration. They go before those stored in a file of `save`, which go before
                the preset's.

        Raises:
            ZooError: the name is unknown, the file cannot be had, or what is in it does not fit, by name.
        """
        chosen, path = self.preset(name), self.weights_path(name, weights)
        state, metadata = files.read(path)
        published = None if "zoo" in metadata else self._published(name, state, overrides)
        if "zoo" in metadata:
            stored = files.description(metadata, path, "system", "config")
            system = chosen.tokenizer.__module__.split(".")[-2]
            if stored["system"] != system:
                raise ZooError(f"{path} holds the system '{stored['system']}', and {name} is of another.")
            overrides = stored["config"] | overrides
        elif hasattr(published, "fields_of"):  # the authors' files of this system differ in what is in them
            overrides = published.fields_of(state) | overrides
        made = self._make(name, overrides)
        if published:
            state = published.from_published(state, made.config)
        if fresh:
            state = with_fresh(state, made, fresh)
        files.load(made, state, path)
        return made.to(device=device, dtype=dtype).eval()

    def _published(self, name: str, state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> ModuleType | None:
        """The names of the authors, where those in a file are not ours."""
        with torch.device("meta"):  # only to see our names
            known = self._make(name, overrides).state_dict().keys()
        system = self.preset(name).tokenizer.__module__.rsplit(".", 1)[0]
        return None if state.keys() <= known else importlib.import_module(f"{system}.published")

    def with_weights(self, made: Any, weights: str | Path | None = None) -> Any:
        """What `load` gives for the name and the configuration of something made."""
        known = config_fields(self.preset(made.info.name).config)
        changed = {name: value for name, value in config_fields(made.config).items() if value != known[name]}
        return self.load(made.info.name, weights, **changed)

    def weights_path(self, name: str, weights: str | Path | Weights | None = None) -> Path:
        """The file that `load` reads for these arguments, downloaded if need be."""
        registered = self.preset(name).weights
        if weights is None and registered is None:
            raise ZooError(f"no weights are published for {name}; train it, or pass weights='path/to/a/file'.")
        if weights is None and registered.location and not is_hub(registered.location):
            registered = replace(registered, location=str(resource("checkpoints") / registered.location))
        return files.locate(registered if weights is None else weights, name)


def with_fresh(state: Mapping[str, Tensor], made: nn.Module, parts: Sequence[str]) -> dict[str, Tensor]:
    """The state, its entries of some parts replaced by those of what was made. Raises ZooError for unknown parts."""
    own = made.state_dict()
    for part in parts:
        if not any(name.split(".")[0] == part for name in own):
            raise ZooError(f"{made.info.name} has no part '{part}'{nearest(part, {n.split('.')[0] for n in own})}")
    kept = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in parts}
    return kept | {name: tensor for name, tensor in own.items() if name.split(".")[0] in parts}


def save(made: nn.Module, path: str | Path) -> None:
    """Write what a registry made as one safetensors file that `load(name, weights=path)` reads, sizes included."""
    system = type(made).__module__.split(".")[-2]
    about = {"name": made.info.name, "system": system, "config": config_fields(made.config)}
    files.save(path, made.state_dict(), about)


def resource(folder: str) -> Path:
    """Path of conf/ or checkpoints/: inside an installed package, at the root of a checkout."""
    package = Path(__file__).parent
    return next((p for p in (package / folder, package.parent / folder) if p.is_dir()), package / folder)


def is_hub(location: str) -> bool:
    return location.startswith("hf://")


def has_weights(preset: Preset) -> bool:
    """Whether a program can load weights by the name alone: shipped with the package, or on a hub."""
    location = preset.weights and preset.weights.location
    return bool(location) and (is_hub(location) or (resource("checkpoints") / location).is_file())


def is_here(preset: Preset) -> bool:
    """Whether its weights are on this machine: shipped with the package, or in the cache of the hub."""
    return has_weights(preset) and (not is_hub(preset.weights.location) or files.in_cache(preset.weights.location))


tokenizers, generators = Registry("tokenizer"), Registry("generator")
encoders, decoders = Registry("encoder"), Registry("decoder")
KINDS = tokenizers, generators, encoders, decoders
presets, preset, weights_path = tokenizers.presets, tokenizers.preset, tokenizers.weights_path
create_tokenizer, load_tokenizer, list_tokenizers = tokenizers.create, tokenizers.load, tokenizers.list
register_tokenizer, save_tokenizer = tokenizers.register, save
create_generator, load_generator, list_generators = generators.create, generators.load, generators.list
create_encoder, load_encoder, list_encoders = encoders.create, encoders.load, encoders.list
create_decoder, load_decoder, list_decoders = decoders.create, decoders.load, decoders.list
