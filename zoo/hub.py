"""Hugging Face's hub: parts from it, or from a local folder of the same files, and models of the zoo to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin

from zoo.errors import ZooError, one_line, shortened
from zoo.files import write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}
"""Their identifiers on the hub; others are named in words."""


class HubModel(ModelHubMixin, library_name="tokenizer-zoo", tags=["tokenizer-zoo"]):
    """Base of what a registry makes, with huggingface_hub's `save_pretrained`, `from_pretrained` and `push_to_hub`.

    A folder, or a repository of the hub, has config.json (name, kind, system and all fields of the configuration),
    model.safetensors and a card, README.md, that is rendered from `info` and `about`.
    """

    about: Mapping[str, Any] = MappingProxyType({})
    """What is known of the weights: "recipe", "data", "metrics" ({name: value}), "card" (text in Markdown). Part of the
    files that are written, and of those that are read."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides,
    ) -> Any:
        """What `save_pretrained` or `push_to_hub` wrote, in evaluation mode, whatever its system.

        Args:
            pretrained_model_name_or_path: "owner/name", "owner/name@revision", or a folder.
            revision: commit, branch or tag.
            sha256: of model.safetensors, in hexadecimal, checked before it is read.
            device, dtype: as in torch.
            cache_dir, force_download, local_files_only, token: of huggingface_hub.hf_hub_download.
            overrides: fields of the configuration, before those of config.json.

        Raises:
            ZooError: the files cannot be had, are not those of the zoo, do not fit, or are of another kind than cls.
        """
        from zoo import registry  # which is made of what stands on this
        from zoo.tokenizer import Weights, make_config

        name, pin = pinned(pretrained_model_name_or_path)
        settings = {"cache_dir": cache_dir, "force_download": force_download, "token": token}
        settings |= {"local_files_only": local_files_only} | pin | ({"revision": revision} if revision else {})
        path = file_of(name, CONFIG, **settings)
        try:
            fields = json.loads(path.read_text())
            own_name, kind, _ = (fields.pop(key) for key in ("name", "kind", "system"))
            (own,) = (one for one in registry.KINDS if one.kind == kind)
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ZooError(
                f"{path} is not what save_pretrained of the zoo wrote; for the authors' files use "
                f"zoo.load_tokenizer(name, weights=...)."
            ) from error
        if not issubclass(own.preset(own_name).tokenizer, cls):
            raise ZooError(f"{name} is a {kind}, {own_name}, and no {cls.__name__}; use zoo.hub.HubModel or its class.")
        make_config(own.preset(own_name).config, fields)  # refuses what are no fields of it
        weights = Weights(str(file_of(name, WEIGHTS, **settings)), sha256)
        return own.load(own_name, weights, device, dtype, **fields | overrides)

    def push_to_hub(self, repo_id: str, **settings) -> str:
        """Write the folder of `save_pretrained` to a repository of the hub, which is made if need be; returns its URL.

        settings: of huggingface_hub's push_to_hub: commit_message, private, token, branch, create_pr, ...
        Raises ZooError where the hub refuses, or cannot be reached.
        """
        from huggingface_hub.errors import HTTPError

        card = {"repo_id": repo_id} | (settings.pop("model_card_kwargs", None) or {})
        try:
            return super().push_to_hub(repo_id, model_card_kwargs=card, **settings)
        except ZooError:
            raise
        except (HTTPError, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ZooError(
                f"cannot write {repo_id} to the hub ({reason}); log in with `hf auth login` "
                "where there is a network, or use save_pretrained."
            ) from error

    def generate_model_card(self, repo_id: str | None = None) -> ModelCard:
        """The README.md of a repository: metadata of the hub, how to load it, and what is known of it."""
        from zoo import registry

        info, kind, about = self.info, registry.kind_of(self.info.name), dict(self.about)
        known = LICENCES.get(info.licence)
        data = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict())
        data.tags = sorted({*data.tags, kind.kind, info.system, *([info.kind] if hasattr(info, "kind") else [])})
        data.license, data.license_name = known or "other", None if known else info.licence
        metrics, card = about.pop("metrics", {}), about.pop("card", "")
        card = "\n".join(line for line in card.splitlines() if not line.startswith("!["))  # its pictures are not here
        rows = {"paper": info.paper, **about, "licence": info.licence}
        rows |= {"parameters": f"{sum(p.numel() for p in self.parameters()):,}"}
        rows |= {name: value for name, value in vars(info).items() if name not in {*rows, "name"}}
        where, name = repo_id or "folder or owner/name", type(self).__name__
        code = f"from {type(self).__module__} import {name}\n\n{kind.kind} = {name}.from_pretrained({where!r})"
        parts = [
            f"# {info.name}\n\n{kind.preset(info.name).description}",
            f"```python\n{code}\n```",
            markdown_table(rows),
            *([f"## Figures\n\n{markdown_table(metrics)}"] if metrics else []),
            card,
        ]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts), ignore_metadata_errors=False)

    def _save_pretrained(self, save_directory: Path) -> None:
        from zoo import registry
        from zoo.tokenizer import config_fields

        registry.save(self, save_directory / WEIGHTS)
        name, system = self.info.name, registry.system_of(type(self))
        about = {"name": name, "kind": registry.kind_of(name).kind, "system": system}
        write_json(save_directory / CONFIG, about | config_fields(self.config))


def markdown_table(rows: Mapping[str, Any]) -> str:
    """Names and what is known of them, as a table in Markdown."""

    def shown(value) -> str:
        if isinstance(value, Mapping):
            value = [f"{name}: {one}" for name, one in value.items()]
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    known = {name.replace("_", " "): shown(value) for name, value in rows.items() if value not in (None, (), {}, "")}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in known.items())])


def pinned(source: str | Path) -> tuple[str, dict[str, str]]:
    """Takes "owner/name@revision" apart: the hub id, and the commit, tag or branch as a setting of what downloads it.

    What has no revision, and folders, come back as they are with no setting.
    """
    name, at, revision = str(source).partition("@")
    return (name, {"revision": revision}) if at and not Path(source).exists() else (str(source), {})


def file_of(
    source: str,
    name: str,
    advice: str = "give 'owner/name' where there is a network, or a folder of its files",
    **settings,
) -> Path:
    """A file of a folder, or of a repository of the hub, through huggingface_hub and its cache.

    settings: of hf_hub_download. Raises ZooError, with the advice, when it cannot be had.
    """
    import huggingface_hub

    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ZooError(f"{folder} has no {name}; give a folder that save_pretrained wrote.")
        return folder / name
    try:
        return Path(huggingface_hub.hf_hub_download(source, name, **settings))
    except (OSError, ValueError) as error:  # LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ...
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ZooError(f"cannot download {name} of {shortened(source, 200)} ({reason}); {advice}.") from error


def pretrained(kind: type, source: str | Path, **settings) -> Any:
    """`kind.from_pretrained(source, **settings)` of transformers: a hub id ("id@commit" for a revision) or a folder.

    Raises ZooError when it is not on this machine and cannot be downloaded, or is something else.
    """
    try:
        name, revision = pinned(source)
        return kind.from_pretrained(name, **revision, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ZooError(
            f"'{source}' is not on this machine as a {kind.__name__} and cannot be downloaded ({reason}); give a "
            "hub id or a folder of its files."
        ) from error
