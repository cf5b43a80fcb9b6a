"""Batches for training and evaluation. Order is a function, position is a number.

Training walks an endless sequence of global batches. Number n of them is a pure function of (seed, n), and the ranks
take their parts of it; workers, ranks and a resumed run only decide who reads what, never what comes. So any number of
workers gives the same batches, N ranks of batch B see what one rank of batch N*B sees, and resuming is going on from a
number.

Sources that can only be read from front to back (pipes, URLs) are the exception: there each worker of each rank has its
own part, and after a resume reads again, without decoding, what it has to skip.
"""

import itertools
import logging
import math
import random
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler
from webdataset.filters import shuffle

from zoo.data.images import MAX_PIXELS, Decoder, collate, expect_augmentation, to_float
from zoo.data.order import Mix, Order, quotas
from zoo.data.sources import BadSample, Indexed, Patience, resolve
from zoo.data.tokens import as_tokens
from zoo.errors import ZooError

log = logging.getLogger(__name__)

HOPELESS = 100  # bad samples in a row
JUDGED_FROM = 100  # samples; among fewer the share of bad ones means nothing, before the end of the epoch
CHANCE = 4  # standard deviations, so that chance ends no long run whose share of bad samples is below the limit
AHEAD = 2  # batches that a worker prepares


class Loader(DataLoader):
    """A DataLoader over a source, shard patterns, {urls, weight}, or a list of these (see `zoo.data.sources.resolve`).

    Its batches are {"key": list[str], "image": (B, 3, H, W) and "depth": (B, 1, H, W) float32 in [0, 1], other fields:
    lists}, see `zoo.data.images.Decoder` for `fields`, `image_size`, and the options of training `crop`, `crop_scale`,
    `flip`.

    Training (`training=True`): full batches in shuffled order, the same number on every rank, no sample twice in an
    epoch. Every iteration gives `len(loader)` batches from the position on, which `state_dict` holds; it is the same on
    all ranks, and valid for another number of workers or, with the same global batch, of ranks. Evaluation: a fixed
    order, every sample once over all ranks, the last batch as small as need be, the length unknown where that of the
    source is; `choose` takes some of the batches.

    A bad sample is left out or, in training, replaced by a copy of the next good one. The bad ones are logged by name
    at the end of an epoch; ZooError when they are more than `max_bad_share` of it, or will be by all appearances.

    batch_size: of this rank.
    shuffle_buffer: samples among which the order is random, after whole shards and files have been put in random order.
    samples_per_epoch: over all ranks, in training; None is one pass over all sources.
    limit: evaluation is over so many samples at the most, counted over all ranks.
    max_pixels: a picture of more is a bad sample, see Decoder.
    timeout, retries: for sources that do not answer, see `zoo.data.sources.Patience`.
    """

    def __init__(
        self,
        sources,
        *,
        batch_size: int,
        fields: Sequence[str] = ("image",),
        image_size: int | None = None,
        training: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        samples_per_epoch: int | None = None,
        limit: int | None = None,
        max_bad_share: float = 0.01,
        crop: str = "center",
        crop_scale: Sequence[float] = (0.8, 1.0),
        flip: bool = False,
        interpolation: str = "bicubic",
        max_pixels: int = MAX_PIXELS,
        timeout: float = Patience.timeout,
        retries: int = Patience.retries,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("image_size", image_size or 1, 1),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("shuffle_buffer", shuffle_buffer, 0),
            ("samples_per_epoch", samples_per_epoch or 1, 1),
            ("limit", 1 if limit is None else limit, 1),
            ("max_pixels", max_pixels, 1),
            ("retries", retries, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ZooError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if rank >= world_size:
            raise ZooError(f"rank must be below world_size={world_size}, got {rank}")
        if not 0 <= max_bad_share <= 1:
            raise ZooError(f"max_bad_share must be a share from 0 to 1, got {max_bad_share}")
        if not timeout > 0:
            raise ZooError(f"timeout must be a number of seconds above 0, got {timeout}")
        expect_augmentation(crop, crop_scale, flip)  # of training, but a mistake in evaluation as well
        if training:
            preparation = {"crop": crop, "crop_scale": crop_scale, "flip": flip}
        else:
            preparation = {"crop": "squash" if crop == "squash" else "center"}
        decoder = Decoder(fields, image_size, interpolation=interpolation, max_pixels=max_pixels, **preparation)
        place, patience = (rank, world_size, num_workers), Patience(timeout, retries)
        if training:
            batches = TrainingBatches(
                resolve(sources), decoder, batch_size, place, patience, seed, shuffle_buffer, samples_per_epoch
            )
        else:
            batches = EvaluationBatches(resolve(sources), decoder, batch_size, place, patience, limit)
        super().__init__(
            batches,
            batch_size=None,
            sampler=_Numbers(batches.steps),
            num_workers=num_workers,
            prefetch_factor=AHEAD if num_workers else None,
            persistent_workers=num_workers > 0,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
        )
        self.training, self.max_bad_share, self.position = training, max_bad_share, 0
        self.rooms, self.guests = [], WeakValueDictionary()

    def __iter__(self) -> Iterator[dict]:
        batches, steps, seen, bad, ended = self.dataset, self.sampler.steps, 0, [], set()
        self.position = self.sampler.start = self.position if self.training else 0
        for number, batch in enumerate(super().__iter__()):
            if batch is None:
                ended.add(number % batches.slots)
                if len(ended) == batches.slots:
                    break
                continue
            if "__error__" in batch:
                raise ZooError(batch["__error__"])
            now, count = batch.pop("__bad__"), len(batch.get("key", ()))
            bad, seen = bad + now, seen + (count if self.training else count + len(now))
            if steps and (self.position + 1) % steps == 0:
                # before the last batch is given out: Lightning asks for no other
                self._judge(seen, bad, final=True)
                bad, seen = [], 0
            elif seen >= JUDGED_FROM:
                self._judge(seen, bad, final=False)
            for name, value in batch.items():
                pixels = batches.rings[name][value].numpy() if isinstance(value, tuple) else value
                if isinstance(pixels, np.ndarray) and pixels.dtype.kind in "bi":  # ids and masks
                    batch[name] = torch.from_numpy(pixels[:count])
                elif isinstance(pixels, np.ndarray):
                    batch[name] = self._room(pixels.shape)[:count]
                    to_float(pixels[:count], out=batch[name].numpy())
            if tokens := {name: batch.pop(name) for name in list(batch) if name.startswith("tokens/")}:
                batch["tokens"] = as_tokens(tokens)
            self.position += 1  # a run that ends before goes on with this batch
            if batch:
                yield batch
        if steps is None:
            self._judge(seen, bad, final=True)

    def _room(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for a batch: pinned if the GPU is in use, else that of an earlier batch of which no tensor is left, as
        fresh pages cost more than what is written into them."""
        if torch.cuda.is_initialized():
            return torch.empty(shape, pin_memory=True)
        i = next(
            (i for i, room in enumerate(self.rooms) if room.shape == shape and i not in self.guests), len(self.rooms)
        )
        if i == 4 * len(self.dataset.rings):
            return torch.empty(shape)
        if i == len(self.rooms):
            self.rooms.append(np.empty(shape, np.float32))
        self.guests[i] = guest = self.rooms[i].view()  # lives as long as a tensor over it
        return torch.from_numpy(guest)

    def _judge(self, seen: int, bad: list[tuple[str, str]], final: bool) -> None:
        allowed = self.max_bad_share * seen
        if not final:  # before the end the share is an estimate, with this many standard deviations to spare
            allowed += CHANCE * math.sqrt(allowed)
        if len(bad) > allowed:
            raise ZooError(
                f"{len(bad)} of {seen} samples cannot be used, more than max_bad_share={self.max_bad_share} allows; "
                f"the first is {bad[0][0]}: {bad[0][1]}"
            )
        if bad and final:
            names = "".join(f"\n  {name}: {reason}" for name, reason in bad[:10]) + "\n  ..." * (len(bad) > 10)
            log.warning("%d of %d samples could not be used:%s", len(bad), seen, names)

    def choose(self, numbers: Sequence[int]) -> None:
        """Evaluation: give these batches only, of the `len(loader)` that there are; not for streams."""
        self.sampler.choose(numbers)

    def state_dict(self) -> dict[str, int]:
        epoch, batch = divmod(self.position, self.dataset.steps)
        return {"epoch": epoch, "samples": batch * self.dataset.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        batch, again = divmod(state["samples"], self.dataset.global_batch)
        if again:
            log.warning("the epoch goes on with another global batch: %d samples come a second time", again)
        self.position = state["epoch"] * self.dataset.steps + batch


class Batches(Dataset):
    """What a rank's batch of a number is, for a DataLoader that deals the numbers out to its workers in turn.

    steps: batches of this rank in an epoch; None if unknown.
    slots: parts into which a rank cuts what can only be streamed; batch n belongs to slot n % slots.
    """

    steps: int | None

    def __init__(
        self, sources: list, decoder: Decoder, batch_size: int, place: tuple[int, int, int], patience: Patience
    ):
        self.sources, self.decoder, self.batch_size, self.patience = sources, decoder, batch_size, patience
        self.rank, self.world_size, workers = place
        self.slots, self.global_batch = max(1, workers), batch_size * self.world_size
        # Memory that the workers and the main process share for good. To share new memory for every batch, as a
        # DataLoader does, takes as long as decoding where page faults are slow. Three places a worker: it fills one
        # while another is ready and a third is copied out.
        self.turn, self.rings, size = 0, {}, decoder.image_size
        for name, channels, dtype in (("image", 3, torch.uint8), ("depth", 1, torch.float32)):
            if size and name in decoder.fields:
                ring = torch.empty(self.slots, AHEAD + 1, batch_size, channels, size, size, dtype=dtype)
                self.rings[name] = ring.share_memory_() if workers else ring

    def __getitem__(self, number: int) -> dict | None:
        """The batch with the bad samples met on the way; {"__error__"} for a ZooError, which would lose its one
        sentence on the way out of a worker; None at the end of a stream."""
        worker, bad = get_worker_info(), []
        self.turn = (self.turn + 1) % (AHEAD + 1)
        place = (worker.id if worker else 0, self.turn)
        buffers = {name: ring[place].numpy() for name, ring in self.rings.items()}
        try:
            batch = collate(self.samples(number, bad), self.batch_size, buffers)
        except ZooError as error:
            return {"__error__": str(error)}
        shared = {name: place for name, buffer in buffers.items() if batch.get(name) is buffer}
        return batch | shared | {"__bad__": bad} if batch or bad else None

    def samples(self, number: int, bad: list[tuple[str, str]]) -> Iterator[dict]:
        raise NotImplementedError

    def decode(self, s: int, raw: dict | BadSample, rng: random.Random | None = None) -> dict:
        if isinstance(raw, BadSample):
            raise raw
        return self.decoder(raw, self.sources[s].depth, self.sources[s].squash, rng)

    def part(self, s: int, slot: int, urls: list[str]) -> Iterator[dict | BadSample]:
        """What a slot of this rank reads of a stream: whole shards if there are enough, else every n-th sample."""
        mine, all_slots = self.rank * self.slots + slot, self.world_size * self.slots
        if len(urls) >= all_slots:
            return self.sources[s].stream(urls[mine::all_slots], self.patience)
        return itertools.islice(self.sources[s].stream(urls, self.patience), mine, None, all_slots)


class EvaluationBatches(Batches):
    """Of `total` samples over all ranks (None if unknown) this rank has those from `begin` to `end`."""

    def __init__(
        self,
        sources: list,
        decoder: Decoder,
        batch_size: int,
        place: tuple[int, int, int],
        patience: Patience,
        limit: int | None,
    ):
        super().__init__(sources, decoder, batch_size, place, patience)
        if all(isinstance(source, Indexed) for source in sources):
            self.orders = [Order(source.sizes, (), 1, shuffled=False) for source in sources]
            self.ends = np.cumsum([order.count for order in self.orders])
            self.total = int(self.ends[-1]) if limit is None else min(limit, int(self.ends[-1]))
            self.begin, self.end = (self.total * r // self.world_size for r in (self.rank, self.rank + 1))
            self.steps = -(-(self.end - self.begin) // batch_size)
        elif limit is not None:
            raise ZooError("limit needs data whose number of images is known: a folder, or local shards.")
        elif len(sources) == 1:
            self.total = self.steps = None
            self.parts = {}
        else:
            raise ZooError("several sources for evaluation must have known sizes: give pipes and URLs one at a time")

    def samples(self, number: int, bad: list[tuple[str, str]]) -> Iterator[dict]:
        count = 0
        for s, raw in self._streamed(number) if self.total is None else self._indexed(number):
            try:
                yield self.decode(s, raw)
                count += 1
            except BadSample as error:
                bad.append(error.args)
            if count == self.batch_size:
                return

    def _indexed(self, number: int) -> Iterator[tuple[int, dict | BadSample]]:
        begin = self.begin + number * self.batch_size
        for position in range(begin, min(begin + self.batch_size, self.end)):
            s = int(np.searchsorted(self.ends, position, side="right"))
            at = self.orders[s](0, position - int(self.ends[s]) + self.orders[s].count)
            try:
                raw = self.sources[s].read(*at, self.patience)
            except BadSample as error:
                raw = error
            yield s, raw

    def _streamed(self, number: int) -> Iterator[tuple[int, dict | BadSample]]:
        slot = number % self.slots
        if number < self.slots:
            self.parts[slot] = self.part(0, slot, self.sources[0].urls)
        for raw in self.parts[slot]:
            yield 0, raw


class TrainingBatches(Batches):
    def __init__(
        self,
        sources: list,
        decoder: Decoder,
        batch_size: int,
        place: tuple[int, int, int],
        patience: Patience,
        seed: int,
        shuffle_buffer: int,
        samples_per_epoch: int | None,
    ):
        super().__init__(sources, decoder, batch_size, place, patience)
        self.seed, self.window = seed, max(1, shuffle_buffer)
        self.orders = [
            Order(source.sizes, (seed, 0, s), self.window) if isinstance(source, Indexed) else None
            for s, source in enumerate(sources)
        ]
        self.reached, self.tapes = None, {}
        counts = [order and order.count for order in self.orders]
        if samples_per_epoch is None and None in counts:
            raise ZooError("pipes, URLs and compressed shards have no known number of samples: give samples_per_epoch")
        self.total = samples_per_epoch or sum(counts)
        self.steps = self.total // self.global_batch
        if not self.steps:
            raise ZooError(
                f"an epoch of {self.total} samples has no batch of {batch_size} for each of {self.world_size} ranks: "
                "take a smaller batch_size"
            )
        weights = [source.weight for source in sources]
        if len(sources) == 1:
            weights = [1]
        elif self.total >= 10**9:
            raise ZooError(f"an epoch of a mix must have under 1e9 samples: give samples_per_epoch, not {self.total}")
        elif None in weights:
            weights = counts
        if None in weights:
            raise ZooError("a mix with pipes or URLs needs the weight of each of its sources")
        self.mix = Mix(quotas(weights, self.total), (seed, 1))

    def samples(self, number: int, bad: list[tuple[str, str]]) -> Iterator[dict]:
        epoch, batch = divmod(number, self.steps)
        if self.reached != (epoch, batch - self.slots):  # a new epoch, or resumed
            self.tapes = {}
        self.reached = epoch, batch
        for position in self._positions(batch):
            yield self._sample(epoch, batch, position, bad)

    def _positions(self, batch: int) -> range:
        begin = batch * self.global_batch + self.rank * self.batch_size
        return range(begin, begin + self.batch_size)

    def _sample(self, epoch: int, batch: int, position: int, bad: list[tuple[str, str]]) -> dict:
        """The sample of a position. If it is bad, a copy of the next good one, so that nothing behind it moves up."""
        s, ordinal = self.mix(epoch, position)
        rng = random.Random(f"{self.seed} {epoch} {position}") if self.decoder.augments else None
        for ahead in range(HOPELESS):
            try:
                if self.orders[s]:
                    return self.decode(s, self._indexed(s, epoch, ordinal + ahead), rng)
                return self.decode(s, self._streamed(s, epoch, batch, ahead), rng)
            except BadSample as error:
                if not ahead:
                    name, reason = error.args
                    bad.append((name, reason))
        raise ZooError(f"{HOPELESS} samples in a row cannot be used; the first is {name}: {reason}")

    def _indexed(self, s: int, epoch: int, ordinal: int) -> dict:
        """Number `ordinal` of what the epoch takes from a source. As many epochs as fit are cut from one pass, so that
        none goes from one pass into another, which would give it some samples twice."""
        order, quota = self.orders[s], int(self.mix.quotas[s])
        turn, part = divmod(epoch, max(1, order.count // quota))
        more, position = divmod(part * quota + ordinal, order.count)
        return self.sources[s].read(*order(turn * -(-quota // order.count) + more, position), self.patience)

    def _streamed(self, s: int, epoch: int, batch: int, ahead: int) -> dict | BadSample:
        """The next sample of a slot's part of a stream, or the one `ahead` of it, which stays where it is."""
        if s not in self.tapes:
            earlier = range(batch % self.slots, batch, self.slots)
            taken = sum(self.mix(epoch, p)[0] == s for b in earlier for p in self._positions(b))
            self.tapes[s] = deque(), itertools.islice(self._endless(s, epoch, batch % self.slots), taken, None)
        waiting, tape = self.tapes[s]
        if not ahead:
            return waiting.popleft() if waiting else next(tape)
        while len(waiting) < ahead:
            waiting.append(next(tape))
        return waiting[ahead - 1]

    def _endless(self, s: int, epoch: int, slot: int) -> Iterator[dict | BadSample]:
        urls = self.sources[s].urls
        urls = [urls[i] for i in np.random.default_rng([self.seed, 2, s, epoch]).permutation(len(urls))]
        for turn in itertools.count():
            rng, found = random.Random(f"{self.seed} {epoch} {self.rank} {slot} {turn}"), False
            for raw in shuffle(self.window, initial=self.window, rng=rng)(self.part(s, slot, urls)):
                found |= not isinstance(raw, BadSample)
                yield raw
            if not found:
                raise ZooError(f"no samples in {urls[0]}" + f" and {len(urls) - 1} more streams" * (len(urls) > 1))


def read_all(sources, fields: Sequence[str], image_size: int | None = None) -> dict:
    """Every sample of some sources as one batch; numbers become tensors as well."""
    whole = joined(list(Loader(sources, batch_size=64, fields=fields, image_size=image_size)))
    return {name: torch.tensor(one) if isinstance(one[0], (int, float)) else one for name, one in whole.items()}


def joined(batches: Sequence[dict]) -> dict:
    """Batches of the same fields, tensors and lists, as one."""
    whole = {}
    for name, first in batches[0].items():
        parts = [batch[name] for batch in batches]
        whole[name] = torch.cat(parts) if isinstance(first, torch.Tensor) else [one for part in parts for one in part]
    return whole


class _Numbers(DistributedSampler):
    """The batch numbers from `start` on, or those that were chosen. A DistributedSampler by name, so that Lightning
    leaves it in its place."""

    def __init__(self, steps: int | None):
        self.steps, self.start, self.chosen = steps, 0, None

    def choose(self, numbers: Sequence[int]) -> None:
        self.steps, self.chosen = len(numbers), numbers

    def __iter__(self) -> Iterator[int]:
        if self.chosen is not None:
            return iter(self.chosen)
        return itertools.count() if self.steps is None else iter(range(self.start, self.start + self.steps))

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("the length of a stream is unknown")
        return self.steps


def _as_it_is(batch):
    return batch


def _begin_worker(worker: int) -> None:
    # Pillow gives the memory of a picture back to the system, and may wait for it as long again as it decodes
    Image.core.set_blocks_max(4)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM sends it to every process; the run ends when it can
