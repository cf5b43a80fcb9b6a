"""Measurements over many batches that ranks share, and of which a killed run loses little."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig
from rich.progress import track

from zoo.commands.common import claim, seed_of
from zoo.data import Loader
from zoo.distributed import on_first_rank
from zoo.files import discard_parts, writing


class SharedBatches:
    """The batches of a source, each on one rank, and on none that an earlier run with the same folder has measured.

    Neither ranks nor interruptions change the images of a batch, and before each the random numbers are seeded by the
    seed and its number. Every cfg.save_every seconds and at the end a rank writes what it has found so far to a file
    of the folder; a later run, on any number of ranks, takes the batches that are in no file.

    Batches of streams have no numbers: there every rank has its own part, and a later run begins again.

    options: of `zoo.data.Loader`.
    state: what was found in all batches so far; tensors on the CPU, numbers, texts, and lists and dicts of these.
    Raises ZooError, on every rank, when the folder holds what was found under another protocol.
    """

    def __init__(
        self,
        fabric: Fabric,
        folder: Path,
        protocol: dict,
        source,
        options: dict,
        cfg: DictConfig,
        state: Callable[[], object],
    ):
        self.fabric, self.folder, self.cfg, self.state = fabric, folder, cfg, state
        rank, ranks = fabric.global_rank, fabric.world_size
        self.options = {"sources": source, "limit": cfg.limit, **options}
        self.loader = Loader(**self.options)
        self.stream = self.loader.dataset.steps is None
        if fabric.is_global_zero and (self.stream or not any(folder.glob("*.pt"))):
            shutil.rmtree(folder, ignore_errors=True)
        claim(fabric, folder, protocol)
        earlier, done = [], set()
        if fabric.is_global_zero:  # what the others see of a shared file system may be older
            discard_parts(folder)
            earlier = sorted(folder.glob("*.pt"))
            done = {n for path in earlier for n in torch.load(path, mmap=True, weights_only=True)["batches"]}
        self.earlier, done = fabric.broadcast((earlier, done))
        if self.stream:
            self.loader, self.numbers = Loader(**self.options, rank=rank, world_size=ranks), None
        else:
            missing = [number for number in range(len(self.loader)) if number not in done]
            self.numbers = missing[len(missing) * rank // ranks : len(missing) * (rank + 1) // ranks]
            self.loader.choose(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        """(number, batch) of this rank's batches."""
        saved = time.monotonic()
        for batch in track(self.loader, "images", disable=not self.fabric.is_global_zero, transient=True):
            place = self.loader.position - 1
            if place and not self.stream and time.monotonic() - saved >= self.cfg.save_every:
                self._save(self.numbers[:place])
                saved = time.monotonic()
            number = place * self.fabric.world_size + self.fabric.global_rank if self.stream else self.numbers[place]
            torch.manual_seed(seed_of(self.cfg.seed, number))
            yield number, batch
        self._save(self.numbers)

    def found(self) -> list | None:
        """What `state` returned on each rank of each run, on the first rank; None on the others."""
        path = self._path()
        paths = on_first_rank([path] if path else [])
        if paths is None:
            return None
        paths = sorted([*self.earlier, *paths])
        return [torch.load(path, weights_only=True)["state"] for path in paths]

    def first(self) -> dict | None:
        """The first batch of the source; None where there is none."""
        loader = Loader(**self.options | {"num_workers": 0})
        if not self.stream:
            loader.choose(range(min(1, len(loader))))
        return next(iter(loader), None)

    def _path(self) -> Path | None:
        if self.stream:
            return self.folder / f"rank{self.fabric.global_rank:05d}.pt"
        return self.folder / f"{self.numbers[0]:09d}.pt" if self.numbers else None

    def _save(self, numbers: list[int] | None) -> None:
        if path := self._path():
            with writing(path) as file:
                torch.save({"batches": numbers, "state": self.state()}, file)
