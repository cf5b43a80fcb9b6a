"""How a command line becomes a composed configuration, and a user's mistake one line."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.commands.common import started_by
from zoo.distributed import leave
from zoo.errors import ZooError, expect_integer, nearest, one_line, shortened
from zoo.registry import KINDS, Registry, resource, tokenizers
from zoo.tokenizer import config_fields

KINDS_OF_FIELDS = {bool: "true or false", int: "an integer", str: "a text", DictConfig: "fields", ListConfig: "a list"}
MISTAKES = (HydraException, OmegaConfBaseException, ZooError, MisconfigurationException)


def run(command: str, task: Callable[[DictConfig], object], argv: list[str] | None = None) -> int:
    """Compose conf/COMMAND.yaml with the overrides in argv (default: sys.argv[1:]) and call task on it.

    Returns the exit code: 0, or 2 after a mistake of the user, which is told in one line without a traceback
    (HYDRA_FULL_ERROR=1 shows it). `output_dir` of the configuration is made absolute, one folder a job in a multirun.
    """
    store_presets()
    overrides = sys.argv[1:] if argv is None else argv
    original, show = sys.argv, bool(os.environ.get("HYDRA_FULL_ERROR"))
    mistakes, began = [], []

    def job(cfg: DictConfig) -> None:
        began.append(cfg)
        sys.argv = original  # Lightning starts the other ranks with it
        by_time = "${now:" in OmegaConf.to_container(cfg)["output_dir"]
        cfg.output_dir = HydraConfig.get().runtime.output_dir
        try:
            launcher, started = started_by()
            if by_time and started > 1:
                raise ZooError(f"{launcher} started {started} processes, which share a folder; say output_dir=DIR.")
            check(cfg, command)
            task(cfg)
        except MISTAKES as error:  # the other jobs of a multirun go on
            if show:
                raise
            mistakes.append(error)

    sys.argv = [sys.argv[0], *overrides]  # hydra's completion is for the program of that name
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises instead of printing and exiting
    try:
        hydra.main(version_base="1.3", config_path=str(resource("conf")), config_name=command)(job)()
    except MISTAKES as error:
        if show:
            raise
        mistakes.append(error)
    except Exception as error:
        if began or show:
            raise
        # hydra's own, of a line that it cannot compose, or of an output_dir that it cannot make
        mistakes.append(
            ZooError(f"the command line is not possible ({one_line(error)}); HYDRA_FULL_ERROR=1 tells more.")
        )
    finally:
        leave()
        sys.argv = original
        GlobalHydra.instance().clear()
        if not show:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    for error in mistakes:
        print(f"zoo {command}: {explain(error, command, overrides)}", file=sys.stderr)
    return 2 if mistakes else 0


def with_open_fields(argv: list[str] | None, *fields: str) -> list[str]:
    """The overrides in argv (default: sys.argv[1:]), of which those below these fields may add keys: what encode takes,
    for one, is the tokenizer's affair, so that conf/COMMAND.yaml cannot name it."""
    below = tuple(f"{field}." for field in fields)
    return [f"++{one}" if one.startswith(below) else one for one in (sys.argv[1:] if argv is None else argv)]


def compose(command: str, overrides: list[str] | None = None) -> DictConfig:
    """The configuration of a command as its command line would give it, for use from Python."""
    store_presets()
    with hydra.initialize_config_dir(str(resource("conf")), version_base="1.3"):
        cfg = hydra.compose(command, overrides or [])
    check(cfg, command)
    return cfg


def store_presets() -> None:
    """Make every preset an option of the group of its kind (`tokenizer`, ...), so that its sizes stand in one place."""
    store = ConfigStore.instance()
    for registry in KINDS:
        stored = store.repo.get(registry.kind, {})
        for name in registry.presets():
            if f"{name}.yaml" not in stored:
                store.store(group=registry.kind, name=name, node=preset_node(name, registry))


def preset_node(name: str, registry: Registry = tokenizers) -> dict:
    """What a configuration holds of a preset under its kind."""
    return {"_target_": f"zoo.create_{registry.kind}", "name": name} | config_fields(registry.preset(name).config)


def changed_fields(node: DictConfig, registry: Registry = tokenizers) -> dict:
    """Fields of what a registry makes, as in cfg, that are not the preset's, for its `load`."""
    config = registry.preset(node.name).config
    known = json.loads(json.dumps(config_fields(config)))  # tuples as lists, as they are in the node
    fields = {name: value for name, value in OmegaConf.to_container(node).items() if name not in ("_target_", "name")}
    return {name: value for name, value in fields.items() if value != known.get(name)}


def check(cfg: DictConfig, command: str) -> None:
    """Raise ZooError where a value does not have the type that its callable's signature states, or that of its default
    in conf/COMMAND.yaml."""
    plain = OmegaConf.to_container(OmegaConf.load(resource("conf") / f"{command}.yaml"))
    # the last three are of several kinds, and checked where they are used
    for name in plain.keys() - {"defaults", "hydra", "devices", "resume", "tokenizers"}:
        default, node = plain[name], cfg._get_node(name) if name in cfg else None
        kind = DictConfig if isinstance(default, dict) else ListConfig if isinstance(default, list) else type(default)
        value = node if kind in (DictConfig, ListConfig) else cfg.get(name)
        if default is not None and (type(value) is not kind or (node is not None and node._is_none())):
            raise ZooError(f"{name} must be {KINDS_OF_FIELDS[kind]}, such as {default!r}, got {shortened(value)}.")
    for key, node in _targets(cfg):
        try:
            target = hydra.utils.get_object(node["_target_"])
        except Exception as error:  # of the import of whatever stands there
            raise ZooError(
                f"{key}._target_ must name a class or function, got {shortened(node['_target_'])}."
            ) from error
        function = target.__init__ if isinstance(target, type) else target
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError):  # names of a package that is not installed, or no Python function
            continue
        for name, hint in hints.items():
            if name in node and not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
                _expect(f"{key}.{name}", node[name], hint)
    expect_integer("seed", cfg.seed, 0, 2**32 - 1)


def explain(error: Exception, command: str, overrides: list[str]) -> str:
    """One line for an error of hydra, OmegaConf, Lightning or the zoo, with the nearest names for a misspelt key."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return _line(error.__cause__)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group} has no '{name}'{nearest(name, error.options)}"
    if isinstance(error, ConfigCompositionException):
        # "Could not override 'a.b'. Key 'b' is not in struct", "Could not find 'group/name'", ...
        match = re.search(r"Could not override '([^']+)'", str(error))
        if match:
            key = match[1].split("@")[0]
            rest = [o for o in overrides if o.lstrip("+~").split("=")[0] != key]
            try:
                known = _keys(compose(command, rest))
            except (*MISTAKES, ValueError):  # there is more than one
                return _line(error)
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            close = close or [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]][:12]
            return f"the configuration has no '{key}'; did you mean {' or '.join(close)}?"
        if error.__cause__ is not None and "merging override" in str(error):
            return f"{one_line(error)} is not possible: {one_line(error.__cause__)}"
    return _line(error)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("object_type", "reference_type")))


def _targets(node, key: str = ""):
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        children = [(name, node._get_node(name)) for name in node]
    elif isinstance(node, ListConfig):
        children = [(str(i), node._get_node(i)) for i in range(len(node))]
    else:
        return
    for name, child in children:
        yield from _targets(child, f"{key}.{name}".strip("."))


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in cfg:
        keys.append(f"{prefix}{name}")
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += _keys(node, f"{prefix}{name}.")
    return keys


def _expect(key: str, value, hint) -> None:
    kinds = _kinds(hint)
    if not kinds or value is None:
        return
    number = type(value) is int and float in kinds
    if not (number or type(value) in kinds or isinstance(value, (DictConfig, ListConfig))):
        names = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise ZooError(f"{key} must be {names}, got {value!r}.")


def _kinds(hint) -> set[type]:
    """The types of a hint that a configuration can hold: int, float, bool, str, list; empty when any could be meant."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    if typing.get_origin(hint) in (list, tuple, dict) or hint in (list, tuple, dict):
        return {list}
    return {hint} if hint in (int, float, bool, str) else set()
