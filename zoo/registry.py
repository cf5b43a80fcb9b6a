"""Names of the zoo: which there are, and how a name becomes a tokenizer, a generator, an encoder or a decoder."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import pkgutil
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo import weights as files
from zoo.errors import ZooError, nearest, one_line, shortened
from zoo.hub import HubModel
from zoo.tokenizer import Preset, Weights, config_fields, make_config

if TYPE_CHECKING:
    from rich.table import Table


class Registry:
    """Names of one kind: "tokenizer", "generator", "encoder" or "decoder".

    A name is a Preset in the PRESETS of a file called like the kind, in any folder under zoo/tokenizers, or in an
    installed package that names itself in the entry points "zoo.tokenizers".
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._shipped: dict[str, Preset] | None = None
        self._registered: dict[str, Preset] = {}

    def presets(self) -> dict[str, Preset]:
        """Every name: those of the package and of packages beside it, and what `register` added.

        Raises ZooError for a package beside it that cannot be imported, or has a name that is taken.
        """
        if self._shipped is None:
            import zoo.tokenizers

            found: dict[str, Preset] = {}
            for folder in pkgutil.iter_modules(zoo.tokenizers.__path__, "zoo.tokenizers."):
                found |= presets_in(f"{folder.name}.{self.kind}")
            for package in entry_points(group="zoo.tokenizers"):
                try:
                    added = presets_in(f"{package.value}.{self.kind}")
                except ImportError as error:
                    raise ZooError(
                        f"the package '{package.value}' adds tokenizers to the zoo and cannot be imported ({error}); "
                        f"mend it, or uninstall {package.dist.name}."
                    ) from error
                if taken := sorted(found.keys() & added.keys()):
                    raise ZooError(f"the package '{package.value}' adds '{taken[0]}', a name that is taken; rename it.")
                found |= added
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

    def list(self, pattern: str = "*", pretrained: bool | None = None) -> Names:
        """Sorted names that match a pattern such as "karl*"; pretrained=True: only those that load by name alone.

        A list, which is shown as a table of what stands behind the names.
        """
        return Names(
            sorted(
                name
                for name, preset in self.presets().items()
                if fnmatch.fnmatch(name, pattern) and pretrained in (None, has_weights(preset))
            )
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
        made.about = {}
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
            system = system_of(chosen.tokenizer)
            if stored["system"] != system:
                raise ZooError(f"{path} holds the system '{stored['system']}', and {name} is of another.")
            overrides = stored["config"] | overrides
        elif hasattr(published, "fields_of"):  # the authors' files of this system differ in what is in them
            overrides = published.fields_of(state) | overrides
        made = self._make(name, overrides)
        if "zoo" in metadata and isinstance(stored.get("about"), dict):
            made.about |= stored["about"]
        if weights is None and self.ships(name) and (card := path.with_suffix(".md")).is_file():
            made.about.setdefault("card", card.read_text())
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
        package = self.preset(name).tokenizer.__module__.rpartition(".")[0]
        has_names = bool(package) and importlib.util.find_spec(f"{package}.published")
        return importlib.import_module(f"{package}.published") if has_names and not state.keys() <= known else None

    def with_weights(self, made: Any, weights: str | Path | None = None) -> Any:
        """What `load` gives for the name and the configuration of something made."""
        known = config_fields(self.preset(made.info.name).config)
        changed = {name: value for name, value in config_fields(made.config).items() if value != known[name]}
        return self.load(made.info.name, weights, **changed)

    def ships(self, name: str) -> bool:
        """Whether the weights of a name are a file in checkpoints/."""
        weights = self.preset(name).weights
        return bool(weights and weights.location and not weights.location.startswith("hf://"))

    def weights_path(self, name: str, weights: str | Path | Weights | None = None) -> Path:
        """The file that `load` reads for these arguments, downloaded if need be."""
        registered = self.preset(name).weights
        if weights is None and registered is None:
            raise ZooError(f"no weights are published for {name}; train it, or pass weights='path/to/a/file'.")
        if weights is None and self.ships(name):
            registered = replace(registered, location=str(resource("checkpoints") / registered.location))
        return files.locate(registered if weights is None else weights, name)


def presets_in(module: str) -> dict[str, Preset]:
    """PRESETS of a module; none where its package has no such module. Raises ImportError without the package."""
    return importlib.import_module(module).PRESETS if importlib.util.find_spec(module) else {}


def system_of(kind: type) -> str:
    """The package that a class lives in: "aurora" of zoo.tokenizers.aurora.tokenizer."""
    return kind.__module__.split(".")[-2:][0]


def with_fresh(state: Mapping[str, Tensor], made: nn.Module, parts: Sequence[str]) -> dict[str, Tensor]:
    """The state, its entries of some parts replaced by those of what was made. Raises ZooError for unknown parts."""
    own = made.state_dict()
    for part in parts:
        if not any(name.split(".")[0] == part for name in own):
            raise ZooError(f"{made.info.name} has no part '{part}'{nearest(part, {n.split('.')[0] for n in own})}")
    kept = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in parts}
    return kept | {name: tensor for name, tensor in own.items() if name.split(".")[0] in parts}


def save(made: HubModel, path: str | Path) -> None:
    """Write what a registry made as one safetensors file that `load(name, weights=path)` reads, sizes included."""
    stored = {"name": made.info.name, "system": system_of(type(made)), "config": config_fields(made.config)}
    files.save(path, made.state_dict(), stored | ({"about": dict(made.about)} if made.about else {}))


def kind_of(name: str) -> Registry:
    """The registry that has a name. Raises ZooError with the nearest tokenizers where none has."""
    return next((kind for kind in KINDS if name in kind.presets()), tokenizers)


class Names(list):
    """Names of the zoo, a list whose printed form is a table of what they are."""

    def __repr__(self) -> str:
        from rich.console import Console

        with (console := Console(width=max(shutil.get_terminal_size().columns, 100))).capture() as capture:
            console.print(table(self))
        return capture.get().rstrip()


def table(names: Iterable[str]) -> Table:
    """What stands behind names of the zoo, for rich to print."""
    from rich.table import Column, Table

    whole = Column("name", overflow="fold")  # names are to be copied: never cut
    table = Table(whole, Column("system", no_wrap=True), "what", Column("weights", no_wrap=True))
    for name in names:
        chosen = kind_of(name).preset(name)
        where = "by name" if has_weights(chosen) else "your file" if chosen.weights else "none"
        table.add_row(name, system_of(chosen.tokenizer), chosen.description, where)
    return table


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
