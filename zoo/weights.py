"""Weights on disk: read without executing anything, loaded completely or not at all."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from zoo.errors import ZooError, one_line, shortened
from zoo.files import expect_file, writing
from zoo.hub import pinned
from zoo.tokenizer import Weights, is_plain

NESTS = ("ema", "model_ema", "ema_state_dict", "state_dict", "model", "module", "weights", "params")
"""Keys under which training scripts put the weights, best first: an EMA copy is what papers report."""

PREFIXES = ("module.", "_orig_mod.", "tokenizer.")
"""What DDP, torch.compile and the zoo's own training modules put before the names of a tokenizer."""


class MissingWeights(ZooError):
    """A file that a measure or a loss stands on is not on this machine."""


def published_file(url: str) -> Path:
    """Where torch.hub keeps the file of this address. Raises MissingWeights when it is not there, and ZooError when its
    SHA-256 does not begin as its name says (name-397923af.pth).

    Nothing is downloaded: a command does the same with and without a network, and ranks do not race.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not path.is_file():
        raise MissingWeights(f"the file {path.name} is missing: download {url} into the folder {path.parent}.")
    begin = path.stem.rpartition("-")[2]
    if not (found := sha256_of(path)).startswith(begin):
        raise ZooError(f"{path} is not the file of {url}: SHA-256 {found} instead of {begin}...; download it again.")
    return path


def read(path: str | Path, part: str = "tokenizer") -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and metadata of a .safetensors, .pt, .pth, .bin or .ckpt file, on the CPU.

    Nested layouts are unwrapped (an EMA copy wins) and the prefixes of wrappers are taken off; of a checkpoint of a
    training of the zoo only that part is read. torch files are read with weights_only=True, so that nothing in them is
    executed. Raises ZooError when there are no weights in it, or the file is damaged, as far as its format can tell.
    """
    path = expect_file(path, "weights file", "give a path, 'hf://owner/name/file' or leave it out")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        except Exception as error:  # of safetensors, or of torch where a header asks for what it does not have
            raise ZooError(f"{path} is not a complete safetensors file ({one_line(error)}); copy it again.") from error
        return unwrap(tensors, path), metadata or {}
    tensors, size = unwrap(read_torch(path), path, part), path.stat().st_size
    for name, tensor in tensors.items():
        if not is_plain(tensor) or tensor.nbytes > size:  # a view can be of any size
            raise ZooError(
                f"{path} holds {shortened(name)} of shape {tuple(tensor.shape)}, whose values are not all in its "
                f"{size} bytes; save dense tensors."
            )
    return tensors, {}


def read_torch(path: Path, mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU, without executing anything in it; mmap: tensors are read when they are used.

    Raises ZooError for a file that is not whole, holds other objects, or one that would take more memory than disk.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts, size = archive.infolist(), path.stat().st_size
                if sum(part.file_size for part in parts) > size or any(part.compress_type for part in parts):
                    raise ZooError(f"{path} is compressed, as torch writes no file; unpack and save it again.")
                if damaged := archive.testzip():  # which torch does not look at
                    raise ZooError(f"{path} is damaged: its part {damaged} is not what was written; copy it again.")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except ZooError:
        raise
    except pickle.UnpicklingError as error:
        raise ZooError(
            f"{path} holds Python objects beside its weights, or is no torch file, and is not opened, since that would "
            f"execute code from it; save the bare state_dict with safetensors where you trust it. ({one_line(error)})"
        ) from error
    except Exception as error:  # there is no limit to what a damaged pickle raises in torch's unpickler
        raise ZooError(f"{path} is not a complete torch file ({one_line(error)}); copy it again.") from error


def description(metadata: Mapping[str, str], path: str | Path, *fields: str) -> dict[str, Any]:
    """What `save` wrote beside the tensors. Raises ZooError where it is not there, or without one of the fields."""
    try:
        about = json.loads(metadata["zoo"])
        missing = [name for name in fields if name not in about]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ZooError(
            f"{path} does not say what it holds ({one_line(error)}), as zoo's files do; copy it again."
        ) from error
    if missing or not isinstance(about, dict) or not isinstance(about.get("config", {}), dict):
        raise ZooError(f"{path} does not say what it holds: {', '.join(missing) or 'fields'} missing; copy it again.")
    return about


def unwrap(content, path: str | Path = "the file", part: str = "tokenizer") -> dict[str, Tensor]:
    """The tensors by name in a checkpoint of any usual layout."""
    of_training = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    for _ in range(2 * len(NESTS)):  # a file can hold itself
        if not isinstance(content, Mapping):
            break
        nest = next((key for key in NESTS if isinstance(content.get(key), Mapping) and content[key]), None)
        if nest is None:
            break
        content = content[nest]
    tensors = (
        {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if of_training:  # beside the tokenizer there may be discriminators and running statistics
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")} or tensors
    if not tensors:
        raise ZooError(f"{path} holds no tensors by name; expected a state dict, alone or under one of {list(NESTS)}.")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def load(module: nn.Module, state: Mapping[str, Tensor], source: str | Path = "the file") -> None:
    """Load every entry into the module, or none: ZooError lists what does not fit, by name, as `expect_fit` does."""
    expect_fit(module, state, source)
    module.load_state_dict(state)


def expect_fit(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ZooError, with names, for what is missing, unexpected, of another shape or kind, or not finite."""
    own = module.state_dict()
    both = sorted(own.keys() & state.keys())
    shapes = [n for n in both if state[n].shape != own[n].shape]
    kinds = [n for n in both if kind_of(state[n]) != kind_of(own[n])]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(map(str, state.keys() - own.keys())),
        "of another shape": [f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}" for n in shapes],
        "of another kind": [f"{n} {state[n].dtype} instead of {own[n].dtype}" for n in kinds],
    }
    if not any(problems.values()):  # also of numbers that are too large for the module's
        problems["with NaN or infinite values"] = [n for n in both if not state[n].to(own[n].dtype).isfinite().all()]
    if any(problems.values()):
        parts = [f"{len(names)} {what} ({_first(names)})" for what, names in problems.items() if names]
        raise ZooError(f"{source} does not fit {type(module).__name__}: {'; '.join(parts)}; nothing was loaded.")


def kind_of(tensor: Tensor) -> str:
    """ "float", "complex", "bool" or "int"."""
    if tensor.is_floating_point():
        return "float"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "int"


def rename(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Names with every "theirs" prefix of the table ("a.b" stands for "a.b" and all "a.b.*") replaced by "ours".

    The longest prefix wins; names without one are kept, so that load can name them.
    """
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        head = next((head for head in heads if head in table), None)
        renamed[name if head is None else table[head] + name[len(head) :]] = tensor
    return renamed


def locate(weights: str | Path | Weights, name: str = "this tokenizer") -> Path:
    """Local path of a file: a path, "hf://owner/name/file", "hf://owner/name@commit/file", or a registered location.

    Downloads come through huggingface_hub and its cache. Raises ZooError with what to do when it cannot be had.
    """
    sha256 = None
    if isinstance(weights, Weights):
        if weights.location is None:
            raise ZooError(
                f"the weights of {name} cannot be downloaded by a program: get {weights.manual}, then call "
                f"zoo.load_tokenizer('{name}', weights='path/to/the/file')."
            )
        weights, sha256 = weights.location, weights.sha256
    if str(weights).startswith("hf:/"):
        path = _download(weights, name)
    else:
        path = expect_file(weights, "weights file", "give a path, 'hf://owner/name/file' or leave it out")
    if sha256 and (found := sha256_of(path)) != sha256.lower():
        raise ZooError(
            f"{path} is not the file registered for {name}: SHA-256 {found} instead of {sha256}; copy it again."
        )
    return path


def save(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping | None = None) -> None:
    """Write a safetensors file as `zoo.files.writing` does: one that is there is a whole one."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with writing(path) as file:  # not save_file, which gives the file to its owner alone
        file.write(serialize(tensors, {"format": "pt"} | ({"zoo": json.dumps(metadata)} if metadata else {})))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _download(location: str | Path, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    parts = str(location).removeprefix("hf:/").lstrip("/").split("/")
    if len(parts) < 3:
        raise ZooError(
            f"a hub location is 'hf://owner/name/file' or 'hf://owner/name@commit/file', got {shortened(location)}."
        )
    repository, revision = pinned("/".join(parts[:2]))
    try:
        return Path(hf_hub_download(repository, "/".join(parts[2:]), **revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ZooError(
            f"cannot download {shortened(str(location), 200)} for {name} ({reason}); download the "
            f"file where there is a network and pass weights='path/to/{shortened(parts[-1])[1:-1]}'."
        ) from error


def _first(names: list[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
