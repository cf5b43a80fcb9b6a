"""Tokens that `zoo pretokenize` wrote, read back fast enough that no training waits for them."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zoo import registry
from zoo.data.images import Decoder, as_numbers, npy_header
from zoo.data.sources import BadSample, Tars, open_file
from zoo.data.tars import members
from zoo.errors import ZooError
from zoo.tokenizer import Tokens
from zoo.weights import sha256_of

LAYOUT = 2
"""Of the shards and their manifest: raised when what is in them changes."""


class TokenDataset(Tars, Dataset):
    """A folder of `zoo pretokenize`: for any torch DataLoader, or as a source for `zoo.data.Loader`.

        dataset = TokenDataset("tokens", ["caption"])
        DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2, collate_fn=dataset.collate)

    A batch is {"key": list[str], "tokens": Tokens (B, N), others: lists, or tensors for arrays such as "moments"}, and
    `dataset[i]` is one of these with a single image. Latents are float32 in whatever type they are stored; those of a
    KL autoencoder are the means of its posterior, as its encode gives them. Ids and masks are exact.

    Every sample is a read at a known place, so any order is as fast as any other. The headers of a shard are read when
    it is first touched.

    Args:
        folder: output_dir of `zoo pretokenize`.
        fields: what else of each sample: fields that the data had (data.fields), or "moments".
        tokenizer: the name that the tokens must be of; None: any.
        weights: the file that they must have been made with; None: what the zoo has in its checkpoints for the name of
            `tokenizer`, if anything.
        flip: of the two views that `zoo pretokenize flip=true` wrote, one at random (torch's generator); else the
            image as it was.
        verify: compare the SHA-256 of every shard with the manifest now, which reads all of it.
        weight: as of any source in a mix, see `zoo.data.sources.Source`.

    Raises:
        ZooError: no manifest, one of another layout, tokenizer or weights, a shard that is missing, or is not the one
            of the manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        fields: Sequence[str] = (),
        *,
        tokenizer: str | None = None,
        weights: str | Path | None = None,
        flip: bool = False,
        verify: bool = False,
        weight: float | None = None,
    ):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self.members = tuple(self.manifest["members"])
        super().__init__([str(self.folder / name) for name in self.manifest["shards"]], weight=weight)
        fields = [field for field in fields if field != "tokens"]
        self.decoder, self.flip, self.tables = Decoder(fields) if fields else None, flip, {}
        if flip and not self.manifest["protocol"]["flip"]:
            raise ZooError(f"{self.folder} has no mirrored images; write it with `zoo pretokenize flip=true`.")
        if tokenizer is not None:
            self.expect(tokenizer, weights)
        for path, about in zip(self.paths, self.manifest["shards"].values(), strict=True):
            if not os.path.isfile(path):
                raise ZooError(f"{path} is not there, and the manifest names it; copy the folder again.")
            if (size := os.path.getsize(path)) != about["bytes"]:
                raise ZooError(f"{path} has {size} bytes and {about['bytes']} in the manifest; copy it again.")
            if verify and (found := sha256_of(Path(path))) != about["sha256"]:
                raise ZooError(f"{path} has SHA-256 {found} and {about['sha256']} in the manifest; copy it again.")

    def expect(self, tokenizer: str, weights: str | Path | None = None) -> None:
        """Raise ZooError where the tokens are not of that tokenizer, or were not made with these weights."""
        if (name := self.manifest["tokenizer"]["name"]) != tokenizer:
            raise ZooError(f"{self.folder} holds tokens of {name}, expected {tokenizer}; choose that, or other tokens.")
        if weights is None and not registry.tokenizers.ships(tokenizer):
            return
        path = registry.tokenizers.weights_path(tokenizer, weights)
        if (found := sha256_of(path)) != (used := self.manifest["protocol"]["weights"]["sha256"]):
            raise ZooError(
                f"{self.folder} was made with other weights of {name} than {path}: SHA-256 {used} instead of {found}; "
                "pass those, or run `zoo pretokenize` again."
            )

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.array([about["samples"] for about in self.manifest["shards"].values()], np.int64)

    @cached_property
    def ends(self) -> list[int]:
        return self.sizes.cumsum().tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, its tokens a batch of one."""
        return {name: one if name == "tokens" else one[0] for name, one in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """The batch of these samples at once, which is what a DataLoader asks for."""
        try:
            raws = [self.read(*self.place(index)) for index in indices]
            views = torch.randint(2, (len(raws),)).tolist() if self.flip else [0] * len(raws)
            batch = {"key": [raw["__key__"] for raw in raws], "tokens": as_tokens(self.arrays(raws, views))}
            others = [self.decoder(raw, self.depth, self.squash) for raw in raws] if self.decoder else []
        except BadSample as error:
            raise ZooError(f"{error.args[0]} cannot be used: {error.args[1]}; copy the folder again.") from error
        for name in self.decoder.fields if self.decoder else ():
            values = [other[name] for other in others]
            batch[name] = torch.from_numpy(np.stack(values)) if isinstance(values[0], np.ndarray) else values
        return batch

    def place(self, index: int) -> tuple[int, int]:
        """Shard and number within it of a sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        unit = bisect_right(self.ends, index)
        return unit, index - (self.ends[unit - 1] if unit else 0)

    @staticmethod
    def collate(samples: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Samples as one batch, for DataLoader(collate_fn=), which has it already from `__getitems__`."""
        if isinstance(samples, dict):
            return samples
        batch = {name: [sample[name] for sample in samples] for name in samples[0]}
        batch["tokens"] = Tokens.cat(batch["tokens"])
        return {n: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for n, v in batch.items()}

    def arrays(self, raws: Sequence[dict], views: Sequence[int]) -> dict[str, np.ndarray]:
        """The arrays (B, ...) of the tokens of raw samples, of each the view of that number; see `as_tokens`."""
        found, rows = {}, np.arange(len(raws))
        grids = [json.loads(raw["json"]).get("grid") for raw in raws]
        for member in self.members[:-1]:
            array = read_npys([raw[member] for raw in raws], member)
            if max(views) >= array.shape[1]:
                raise ZooError(f"{self.folder} has no mirrored images; write it with `zoo pretokenize flip=true`.")
            array, (name, _, kind) = array[rows, views], member.removesuffix(".npy").rpartition(".")
            if kind == "moments":  # (B, 2 D, h, w): means, then log variances
                mean, grids = array[:, : array.shape[1] // 2], [array.shape[2:]] * len(raws)
                scale = np.float32(self.manifest["tokenizer"]["config"]["scale_factor"])
                found["tokens/latents/image"] = scale * mean.reshape(*mean.shape[:2], -1).swapaxes(1, 2)
            else:
                found["tokens/mask" if kind == "mask" else f"tokens/{kind}/{name}"] = array
        return found | ({} if None in grids else {"tokens/grid": np.array(grids)})

    def _read(self, unit: int, index: int) -> dict:
        path = self.paths[unit]
        if unit not in self.tables:
            self.tables[unit] = member_table(path, self.members, int(self.sizes[unit]))
        heads, starts, ends = (table[index].tolist() for table in self.tables[unit])
        span = os.pread(open_file(path).fileno(), ends[-1] - heads[0], heads[0])
        name = span[:100].rstrip(b"\0").decode()
        if span[156:157] == b"x":  # a long name, or one beyond ASCII
            name = next(members(lambda at, size: span[at : at + size], 0, len(span)))[1]
        raw = {"__key__": name.removesuffix(f".{self.members[0]}"), "__url__": path, "__tokens__": self.arrays}
        places = zip(self.members, starts, ends, strict=True)
        return raw | {member: span[start - heads[0] : end - heads[0]] for member, start, end in places}


def as_tokens(arrays: Mapping[str, Any]) -> Tokens:
    """Tokens of arrays or tensors (B, ...) under the names "tokens/ids/STREAM", "tokens/latents/STREAM", "tokens/mask"
    and "tokens/grid". Raises ZooError where the grids differ."""
    parts = {"ids": {}, "latents": {}, "mask": None, "grid": None}
    for name, array in arrays.items():
        _, kind, *stream = name.split("/", 2)
        if kind == "grid":
            if (array != array[0]).any():
                raise ZooError(f"tokens of the grids {array.tolist()} are no batch; take batch_size=1.")
            parts[kind] = tuple(array[0].tolist())
        elif stream:
            parts[kind][stream[0]] = torch.as_tensor(array)
        else:
            parts[kind] = torch.as_tensor(array)
    return Tokens(**parts)


def read_manifest(folder: Path) -> dict:
    """manifest.json of `zoo pretokenize`. Raises ZooError where there is none, or one of another layout."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ZooError(f"{folder} has no manifest.json; give the output_dir of a finished `zoo pretokenize`.") from None
    except (OSError, ValueError) as error:
        raise ZooError(f"{path} cannot be read ({error}); copy it again.") from error
    whole = isinstance(manifest, dict) and {"protocol", "tokenizer", "members", "shards", "samples"} <= manifest.keys()
    found = manifest["protocol"].get("layout") if whole else None
    if found != LAYOUT:
        raise ZooError(f"{path} is of layout {found}, and {LAYOUT} is read; run `zoo pretokenize` again.")
    if not manifest["samples"]:
        raise ZooError(f"{folder} holds no samples; tokenise some images first.")
    return manifest


def member_table(path: str, names: Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the members of each sample of a shard lie, (count, M) each: offsets of their headers, and of the beginning
    and the end of their data.

    All headers are looked at together: one by one they would take longer than all the rest of reading. Raises ZooError
    when there are other members than the manifest says.
    """
    blocks = np.fromfile(path, np.uint8)
    blocks = blocks[: len(blocks) // 512 * 512].reshape(-1, 512)
    kinds = blocks[:, 156].tobytes()
    sizes = ((blocks[:, 124:135] & 7).astype(np.int64) << 3 * np.arange(10, -1, -1)).sum(1)  # octal digits
    following = (np.arange(len(blocks)) + 1 - (-sizes // 512)).tolist()
    at, head, heads, found = 0, 0, [], []
    while at < len(kinds) and kinds[at] in b"0x":  # x: with the long name of the next one
        if kinds[at] == ord("0"):
            heads.append(head)
            found.append(at)
            head = following[at]
        at = following[at]
    if len(found) != count * len(names) or at > len(kinds):
        raise ZooError(f"{path} has not the {count} samples that the manifest says; copy it again.")
    heads, found = (np.array(one, np.int64).reshape(count, len(names)) for one in (heads, found))
    return 512 * heads, 512 * (found + 1), 512 * (found + 1) + sizes[found]


def read_npys(files: Sequence[bytes], name: str) -> np.ndarray:
    """The arrays (B, ...) in .npy files of one shape and type, as `as_numbers` has them. Raises ZooError."""
    shape, _, dtype, start = npy_header(files[0])
    if not all(len(file) == len(files[0]) and file.startswith(files[0][:start]) for file in files):
        raise ZooError(f"the arrays {name} differ in their shape or type and are no batch; take batch_size=1.")
    data = b"".join([file[start:] for file in files])
    return as_numbers(np.frombuffer(data, dtype).reshape(len(files), *shape))
