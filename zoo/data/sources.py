"""Where samples come from: tar shards, image folders, photographs, the embedded scenes. Nothing is decoded here.

A raw sample is a dictionary of member suffix -> bytes, such as {"jpg": b"...", "json": b"..."}, with its name under
"__key__" and the shard or folder it came from under "__url__".
"""

import itertools
import logging
import os
import re
import select
import signal
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from glob import glob
from importlib.resources import files
from pathlib import Path
from time import sleep

import numpy as np
from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from zoo.data.tars import members, sample_starts, split_name
from zoo.errors import ZooError, nearest

log = logging.getLogger(__name__)

LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of the system that waiting does not mend."""
BROKEN = (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, RecursionError, MemoryError)
"""What reading a broken tar file raises."""
LARGEST = 2**30
"""Bytes of a member of a stream, whose header may promise any number of them."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif")

# The photographs among the files of the scikit-image wheel; its documentation notes them as CC0, public domain or
# without known restrictions. The last is the left picture of a Middlebury 2014 stereo pair, which has its true
# disparity beside it.
PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg", "motorcycle_left.png"),
)
DISPARITY = {"motorcycle_left.png": "motorcycle_disp.npz"}


class BadSample(Exception):
    """A sample that cannot be used: its name, and why."""


@dataclass(frozen=True)
class Patience:
    """With what cannot be read at the moment.

    timeout: seconds without a byte after which a pipe or URL counts as failed.
    retries: how often in a row what failed is tried again, after 1, 2, 4, ... seconds.
    """

    timeout: float = 60.0
    retries: int = 5

    def wait(self, name: str, error: OSError, attempt: int) -> None:
        """Before the next attempt (from 0 on). BadSample after the last one, and at once for what is not there."""
        reason = error.strerror or str(error)
        if attempt == self.retries or isinstance(error, LASTING):
            raise BadSample(name, reason) from None
        seconds = 2**attempt
        log.warning("%s cannot be read (%s); retry %d of %d in %d s", name, reason, attempt + 1, self.retries, seconds)
        sleep(seconds)


@dataclass(eq=False, kw_only=True)
class Source:
    """weight: share in a training mix, relative to the other sources; None is by number of samples.
    depth: what depth members hold: "relative" (high is near, the whole range of the integers is [0, 1]), "distance"
        (0 is unknown) or "disparity" (not finite is unknown).
    squash: depth maps are squashed to a square, as AURORA does, instead of scaled and cropped like pictures.
    """

    weight: float | None = None
    depth: str = "relative"
    squash: bool = False

    def __post_init__(self):
        if self.depth not in (kinds := ("relative", "distance", "disparity")):
            raise ZooError(f"depth={self.depth!r} is nothing a depth map holds{nearest(str(self.depth), kinds)}")
        if self.weight is not None and not (isinstance(self.weight, int | float) and self.weight > 0):
            raise ZooError(f"the weight of a data source must be a positive number, got {self.weight!r}")


class Indexed(Source):
    """A source of known size, `sizes[u]` samples in unit u (a shard, a file), each of them read by its number."""

    sizes: np.ndarray

    def read(self, unit: int, index: int, patience: Patience = Patience()) -> dict:
        """A raw sample; BadSample if its bytes are not all there or cannot be had."""
        for attempt in itertools.count():
            try:
                return self._read(unit, index)
            except OSError as error:
                patience.wait(self.path(unit), error, attempt)

    def path(self, unit: int) -> str:
        raise NotImplementedError

    def _read(self, unit: int, index: int) -> dict:
        raise NotImplementedError


@dataclass(eq=False)
class Files(Indexed):
    """One sample a file, named by its path below `root`; `extra` are further members of some of them.

    classes: folders right below the root; the class of a file is the number of the one that it is in.
    """

    root: Path
    names: list[str]
    suffix: Callable[[str], str]
    extra: dict[str, dict[str, str]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.ones(len(self.names), np.int64)

    def path(self, unit: int) -> str:
        return str(self.root / self.names[unit])

    def _read(self, unit: int, index: int) -> dict:
        name = self.names[unit]
        members = {self.suffix(name): name, **self.extra.get(name, {})}
        raw = {suffix: (self.root / file).read_bytes() for suffix, file in members.items()}
        if self.classes:
            raw["cls"] = str(self.classes.index(Path(name).parts[0])).encode()
        return raw | {"__key__": name, "__url__": str(self.root)}


@dataclass(eq=False)
class Tars(Indexed):
    """Uncompressed tar files on this machine. Their headers are read once; from then on a sample is one read at a known
    place, so that no position of an epoch is further away than another."""

    paths: list[str]

    @cached_property
    def starts(self) -> list[np.ndarray]:
        with ThreadPoolExecutor(8) as pool:  # what takes long is waiting for a network file system
            starts = pool.map(lambda p: sample_starts(p, os.path.getsize(p), os.path.getmtime(p)), self.paths)
        try:
            return list(starts)
        except OSError as error:
            raise ZooError(f"cannot read the shard {error.filename}: {error.strerror}") from error

    @cached_property
    def sizes(self) -> np.ndarray:
        sizes = np.array([len(starts) for starts in self.starts], np.int64)
        if not sizes.sum():
            raise ZooError(f"no samples in {self.paths[0]}" + f" and {len(sizes) - 1} more shards" * (len(sizes) > 1))
        return sizes

    def path(self, unit: int) -> str:
        return self.paths[unit]

    def _read(self, unit: int, index: int) -> dict:
        path, starts = self.paths[unit], self.starts[unit]
        start = int(starts[index])
        try:
            file = open_file(path)
            end = int(starts[index + 1]) if index + 1 < len(starts) else os.fstat(file.fileno()).st_size
            span = os.pread(file.fileno(), max(0, end - start), start)
        except OSError:
            open_file.cache_clear()  # a network file system may have lost it
            raise
        raw = {"__key__": f"byte {start}", "__url__": path}
        for offset, name, data, size in members(lambda at, n: span[at - start : at - start + n], start, end):
            key, suffix = (raw["__key__"], None) if name is None else split_name(name)
            if name is None:
                raise BadSample(f"{path}: {key}", f"no valid tar header at byte {offset}")
            if key is None:
                continue
            if suffix in raw:
                raise BadSample(f"{path}: {key}", f"two members {suffix!r}")
            raw["__key__"], raw[suffix] = key, span[data - start : data - start + size]
            if len(raw[suffix]) < size:
                raise BadSample(f"{path}: {key}", f"the file ends inside the member {suffix!r}")
        if len(raw) == 2:
            raise BadSample(path, "the file is empty (0 bytes)")
        return raw


@dataclass(eq=False)
class Streams(Source):
    """Tar files that can only be read from front to back and have an unknown number of samples: pipes, URLs, compressed
    files."""

    urls: list[str]

    def stream(self, urls: list[str], patience: Patience = Patience()) -> Iterator[dict | BadSample]:
        """Raw samples of those shards in order. Where a shard breaks, a BadSample stands for the rest of it.

        One that fails is read again from its beginning, and what was given of it is skipped.
        """
        for url in urls:
            given = attempt = 0
            while True:
                try:
                    for raw in itertools.islice(self._samples(url, patience.timeout), given, None):
                        given, attempt = given + 1, 0
                        yield raw
                except OSError as error:
                    try:
                        patience.wait(url, error, attempt)
                    except BadSample as bad:
                        yield BadSample(url, f"{bad.args[1]} (the rest of it is not read)")
                    else:
                        attempt += 1
                        continue
                except BROKEN as error:
                    reason = error.args[0] if error.args else repr(error)
                    yield BadSample(url, f"{reason} (the rest of it is not read)")
                break

    def _samples(self, url: str, timeout: float) -> Iterator[dict]:
        """OSError where the reading fails, one of BROKEN where what is read is no tar file."""
        reader, broken = Reader(url, timeout), []
        try:
            yield from group_by_keys(self._members(url, reader, broken))
        finally:
            reader.close()
        if broken:
            raise broken[0]

    def _members(self, url: str, reader: "Reader", broken: list[Exception]) -> Iterator[dict]:
        try:
            with tarfile.open(fileobj=reader, mode="r|*") as tar:
                for member in tar:
                    tar.members = []  # or it keeps all
                    if member.isreg() and split_name(member.name)[0] is not None:
                        if member.size > LARGEST:
                            raise tarfile.ReadError(f"its member {member.name!r} would have {member.size:,} bytes")
                        yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
            padding = 0
            while rest := reader.read(2**20):
                padding += len(rest)
                if rest.strip(b"\0") or padding > LARGEST:
                    raise tarfile.ReadError("it goes on behind the end of its tar file, or has a broken header")
        except BROKEN as error:
            broken.append(error)
        reader.finish()  # a command that failed half-way says more


class Reader:
    """The bytes of a pipe, a URL or a compressed file. OSError where they cannot be had, or none comes for `timeout`
    seconds."""

    def __init__(self, url: str, timeout: float):
        self.timeout, self.ended, self.waiting = timeout, False, select.poll()
        self.group = url.startswith("pipe:")
        if self.group:  # as webdataset does it, but all that the command starts can be killed
            command, options = url.removeprefix("pipe:"), {"stdout": subprocess.PIPE, "start_new_session": True}
            # by its nature a command of the shell, from whoever configures the run
            self.process = subprocess.Popen(command, shell=True, **options)  # noqa: S602
            self.file = self.process.stdout
        else:
            self.file = gopen(url)
            self.process = getattr(self.file, "proc", None)
        self.number = (self.process.stdout if self.process else self.file).fileno()
        self.waiting.register(self.number, select.POLLIN)

    def read(self, size: int) -> bytes:
        """As many bytes, fewer at the end only."""
        parts = []
        while size:
            if not self.waiting.poll(1000 * self.timeout):
                raise TimeoutError(f"no byte came for {self.timeout:g} s")
            part = os.read(self.number, min(size, 2**20))
            if not part:
                self.ended = True
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def finish(self) -> None:
        """OSError if all was read and the command behind it failed."""
        if self.ended and self.process:
            try:
                code = self.process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"its command does not end within {self.timeout:g} s") from None
            if code:
                raise OSError(f"its command failed with exit code {code}")

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            if self.group:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
        with suppress(OSError):  # webdataset complains about the kill
            self.file.close()


@lru_cache(maxsize=64)
def open_file(path: str):
    """To be read with os.pread, which moves nothing that forked workers share."""
    return open(path, "rb", buffering=0)


# --- by name ---------------------------------------------------------------------------------------------------------


def shards(urls: str | Sequence[str], weight: float | None = None, depth: str = "relative") -> Source:
    """webdataset shards: paths with {0000..0099} or *, URLs, `pipe:` commands; a list of them, or "::" between them.

    Uncompressed .tar files on this machine have a known number of samples; anything else needs `samples_per_epoch` for
    training. So do very many local shards whose headers should not all be read first: `pipe:cat name-{0000..9999}.tar`.
    """
    found = [url for pattern in ([urls] if isinstance(urls, str) else urls) for url in _expand(pattern)]
    if not found:
        raise ZooError("the list of shards is empty: give at least one path, URL or pipe: command")
    if all(url.endswith(".tar") and not _scheme(url) for url in found):
        return Tars(found, weight=weight, depth=depth)
    return Streams(found, weight=weight, depth=depth)


def folder(path: str | Path, modality: str = "image", weight: float | None = None) -> Source:
    """Every image file below a folder, by name. Where each is in a sub-folder, the number of that among the sorted ones
    is its "class".

    modality="depth" takes them as depth maps: the first channel as it is, high is near, squashed to the size without
    mixing pixels (the preparation of AURORA's training data).
    """
    if modality not in ("image", "depth"):
        raise ZooError(f"modality={modality!r} of a folder is neither 'image' nor 'depth'")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ZooError(f"{root} is {'a file' if root.exists() else 'not there'}: give the path of a folder of images")
    names = [
        os.path.relpath(os.path.join(parent, name), root)
        for parent, _, children in os.walk(root, followlinks=True)
        for name in children
        if _suffix(name) in IMAGE_SUFFIXES and not name.startswith(".")
    ]
    if not names:
        raise ZooError(f"no images in or below {root}: looked for {', '.join(IMAGE_SUFFIXES)}")
    depth = modality == "depth"
    inside = all(Path(name).parent.name for name in names)
    classes = sorted({Path(name).parts[0] for name in names}) if inside else []
    suffix = _depth_suffix if depth else _suffix
    return Files(root, sorted(names), suffix, classes=classes, weight=weight, squash=depth)


def photos(fields: Sequence[str] = ("image",)) -> Source:
    """The 14 photographs inside the scikit-image wheel, nothing is downloaded. With "depth" among the fields it is the
    one that has it: the left picture of a stereo pair, with its true disparity (7% of the pixels are unknown)."""
    root, names = Path(str(files("skimage") / "data")), list(DISPARITY if "depth" in fields else PHOTOS)
    extra = {name: {"depth.npz": file} for name, file in DISPARITY.items() if "depth" in fields}
    needed = [*names, *(file for more in extra.values() for file in more.values())]
    if missing := [name for name in needed if not (root / name).exists()]:
        raise ZooError(f"the installed scikit-image has no {missing[0]} in {root}: install scikit-image 0.26")
    return Files(root, names, _suffix, extra, depth="disparity")


def scenes(split: str = "train", weight: float | None = None) -> Source:
    """The rendered scenes that come with the zoo, 64x64: `rgb.webp`, `depth.png` (distance), `json` (caption, ...)."""
    if split not in ("train", "val"):
        raise ZooError(f"split={split!r} of the scenes is neither 'train' nor 'val'")
    root = Path(__file__).with_name("embedded")
    paths = sorted(map(str, root.glob(f"scenes-{split}-*.tar")))
    if not paths:
        raise ZooError(f"no {split} scenes in {root}: make them with `python -m zoo.data.render`")
    return Tars(paths, weight=weight, depth="distance")


def resolve(description) -> list[Source]:
    """The sources that a configuration means: a source, shard patterns, {urls, weight, depth}, or a list of these."""
    if isinstance(description, Source):
        return [description]
    if isinstance(description, str):
        return [shards(description)]
    if isinstance(description, Mapping):
        if wrong := set(description) - {"urls", "weight", "depth"} or {"urls"} - set(description):
            raise ZooError(
                f"a data source is urls, with weight and depth if need be; wrong or missing: {', '.join(wrong)}"
            )
        return [shards(**description)]
    if isinstance(description, Sequence) and description:
        if all(isinstance(d, str) for d in description):
            return [shards(description)]
        sources = [source for d in description for source in resolve(d)]
        if len({source.weight is None for source in sources}) == 2:
            raise ZooError("some sources of the mix have a weight and some have none: give one to all or to none")
        return sources
    raise ZooError(f"{description!r} is no data source: give shard patterns, {{urls, weight}}, or a list of these")


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _depth_suffix(name: str) -> str:
    return f"depth.{_suffix(name)}"


def _scheme(url: str) -> str | None:
    match = re.match(r"(\w+):", url)
    return match and match[1]


def _expand(pattern: str) -> Iterator[str]:
    try:
        urls = expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # a variable that is not set, braces that do not close
        raise ZooError(f"cannot expand the shard pattern {pattern!r}: {error}") from None
    for url in urls:
        url = re.sub(r"^file:(//)?", "", url)
        if (scheme := _scheme(url)) is None:
            url = os.path.expanduser(url)
            found = sorted(glob(url)) if re.search(r"[*?[]", url) else [url] if os.path.isfile(url) else []
            if not found:
                raise ZooError(f"there is no file {url}" + f", one of {pattern!r}" * (url != pattern))
            yield from found
        elif scheme not in gopen_schemes:
            raise ZooError(f"cannot open {url}: give a command that writes it, such as 'pipe:aws s3 cp {url} -'")
        else:
            yield url
