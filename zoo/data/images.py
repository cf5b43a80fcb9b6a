"""From the bytes of a sample to arrays: pure functions of the bytes and of a seeded generator."""

import io
import json
import math
import random
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import numpy as np
from PIL import Image, ImageOps

from zoo.data.sources import IMAGE_SUFFIXES, BadSample
from zoo.errors import ZooError, nearest

CROPS = ("center", "random", "resized", "squash")
MAX_PIXELS = 89_478_485
"""From which on Pillow warns of a decompression bomb: 256 MiB of colours."""
INTERPOLATIONS = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR, "opencv": "opencv"}


@dataclass(frozen=True)
class Decoder:
    """Makes the fields that a run asks for out of a raw sample, and decodes nothing else.

    fields: "image", "depth", "tokens" (of `zoo.data.TokenDataset`; with `flip` those of the mirrored image for half of
        the samples), an array in a member `<field>.npy`, the bytes that the file of a picture has ("image_bytes",
        "depth_bytes"), or any text: a member `<field>` or `<field>.txt` (for "caption" also `txt`; for "class" also
        `cls`, a number), else an entry of the member `json`.
    image_size: side of the square; None keeps the size of the file. What has that size is not resampled.
    crop: "center" and "random" scale the shorter side to image_size and cut a square out there; "resized" cuts out a
        `random_box`, its area a share from `crop_scale`, and scales that; "squash" cuts nothing and scales each side
        by itself.
    max_pixels: a picture of more is a bad sample, and is not decoded; Pillow itself refuses more than 178,956,970.
    interpolation: of images, "bicubic" or "bilinear", both with antialiasing, or "opencv": see resize_as_opencv.
    """

    fields: Sequence[str] = ("image",)
    image_size: int | None = None
    crop: str = "center"
    crop_scale: Sequence[float] = (0.8, 1.0)
    flip: bool = False
    interpolation: str = "bicubic"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ZooError(
                f"interpolation={self.interpolation!r} is unknown{nearest(str(self.interpolation), INTERPOLATIONS)}"
            )
        if isinstance(self.fields, str) or not self.fields:
            raise ZooError(f"fields must be a list such as [image, caption], got {self.fields!r}")
        expect_augmentation(self.crop, self.crop_scale, self.flip)
        if "depth" in self.fields and (self.flip or self.crop != "center"):
            raise ZooError("depth maps are neither flipped nor cut otherwise: leave flip=false and crop=center")
        if self.image_size is None and self.crop != "center":
            raise ZooError(f"crop={self.crop} needs an image_size")

    @property
    def augments(self) -> bool:
        return self.flip or self.crop in ("random", "resized")

    def __call__(self, raw: dict, depth: str, squash: bool, rng: random.Random | None = None) -> dict:
        """{"key": str, "image": (3, H, W) bytes, or float in [0, 1], "depth": (1, H, W) float in [0, 1], the arrays of
        "tokens" by their names, other arrays as in `as_numbers`, others as they are}. depth, squash: of the source.
        BadSample for what cannot be made."""
        sample, record = {"key": raw["__key__"]}, None
        try:
            for field in self.fields:
                if field == "image":
                    sample[field] = self._image(*_picture(raw, "image", ("", "image", "rgb")), rng)
                elif field == "depth":
                    sample[field] = self._depth(*_picture(raw, "depth", ("depth",)), depth, squash)
                elif field == "class" and "cls" in raw:
                    sample[field] = int(raw["cls"])
                elif field == "tokens":
                    sample |= _tokens(raw, self.flip and rng.random() < 0.5)
                elif field in ("image_bytes", "depth_bytes"):
                    stems = ("", "image", "rgb") if field == "image_bytes" else ("depth",)
                    sample[field] = len(_picture(raw, field, stems)[1])
                elif f"{field}.npy" in raw:
                    sample[field] = _array(f"{field}.npy", raw[f"{field}.npy"])
                elif text := next(
                    (m for m in (field, f"{field}.txt", *["txt"] * (field == "caption")) if m in raw), None
                ):
                    sample[field] = raw[text].decode()
                else:
                    record = record or _record(raw.get("json", b"{}"))
                    if field not in record:
                        raise BadSample(f"no {field!r} among {_content(raw, record)}")
                    sample[field] = record[field]
        except BadSample as error:
            raise BadSample(f"{raw['__url__']}: {raw['__key__']}", error.args[0]) from None
        except ZooError:
            raise
        except (ValueError, RecursionError) as error:  # bytes that are no text, no number or no JSON
            raise BadSample(f"{raw['__url__']}: {raw['__key__']}", f"{field!r} cannot be read ({error})") from None
        return sample

    def _image(self, suffix: str, data: bytes, rng: random.Random | None) -> np.ndarray:
        image = read_rgb(suffix, data, self.max_pixels)
        if self.image_size:
            resample = INTERPOLATIONS[self.interpolation]
            image = fit(image, self.image_size, self.crop, self.crop_scale, rng, resample)
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if image.mode == "F":
            return np.repeat(np.clip(image, 0, 1)[None], 3, axis=0)
        return np.asarray(image).transpose(2, 0, 1)

    def _depth(self, suffix: str, data: bytes, depth: str, squash: bool) -> np.ndarray:
        values, size = read_depth(suffix, data, self.max_pixels), self.image_size
        if depth == "distance":
            values = near_is_one(np.divide(1, values, out=np.full_like(values, np.nan), where=values > 0))
        elif depth == "disparity":
            values = near_is_one(values)
        if size and values.shape != (size, size):
            image = Image.fromarray(values)
            image = image.resize((size, size), Image.NEAREST) if squash else fit(image, size, resample=Image.NEAREST)
            values = np.array(image)
        return values[None]


def read_rgb(suffix: str, data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright picture of mode "RGB", or "F" in [0, 1] for 16-bit grey. What is transparent lies over white, of an
    animation the first frame is taken, CMYK is converted without a colour profile."""
    image = _open(suffix, data, max_pixels, upright=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode[0] in "IF":
        return Image.fromarray(_sixteen_bits(image))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_depth(suffix: str, data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W) float32: the first channel of a picture, integers over 255 or 65535; or the array in a .npz as it is."""
    if suffix == "depth.npz":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                member = archive.infolist()[0]
                if member.file_size > 9 * max_pixels:  # doubles and their header
                    raise ValueError(f"{member.file_size:,} bytes for max_pixels={max_pixels:,}")
                values = read_npy(archive.read(member)).astype(np.float32)
        except Exception as error:  # as for pictures
            raise BadSample(f"{suffix!r} is no array ({error})") from None
        if values.ndim != 2:
            raise BadSample(f"{suffix!r} has shape {values.shape}, not (height, width)")
        return values
    image = _open(suffix, data, max_pixels)
    if image.mode[0] in "IF":
        return _sixteen_bits(image)
    if image.mode in ("1", "P"):
        image = image.convert("RGB")
    return np.asarray(image.getchannel(0), np.float32) / 255


def near_is_one(inverse: np.ndarray) -> np.ndarray:
    """Inverse depth or disparity, scaled to [0, 1] over the picture. Unknown (not finite) becomes 0, the farthest."""
    known = np.isfinite(inverse)
    low = inverse.min(initial=np.inf, where=known)
    high = inverse.max(initial=-np.inf, where=known)
    if low > high:
        raise BadSample("its depth is nowhere known")
    near = (inverse - low) / max(high - low, np.finfo(np.float32).tiny)
    near[~known] = 0
    return near


def random_box(width: int, height: int, scale: Sequence[float], rng: random.Random) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) pixels of torchvision's RandomResizedCrop: its area a share from scale, its aspect
    ratio from 3/4 to 4/3. Where no such box was found in ten tries, as in photographs of 3:2 with a share of at least
    0.9, it is the largest one in the centre whose aspect ratio is in that range.
    """
    for _ in range(10):
        area, ratio = width * height * rng.uniform(*scale), (3 / 4) ** rng.uniform(-1, 1)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def expect_augmentation(crop: str, crop_scale: Sequence[float], flip: bool) -> None:
    """Raise ZooError where one of them is not what `Decoder` takes."""
    if crop not in CROPS:
        raise ZooError(f"crop={crop!r} is unknown{nearest(str(crop), CROPS)}")
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ZooError(f"crop_scale must be two shares of the area, such as [0.8, 1.0], got {list(crop_scale)}")
    if type(flip) is not bool:
        raise ZooError(f"flip must be true or false, got {flip!r}")


def fit(image: Image.Image, size: int, crop="center", scale=(1, 1), rng=None, resample=Image.BICUBIC) -> Image.Image:
    """A square of that side, see Decoder. "center" is torchvision's Resize and CenterCrop, pixel by pixel, and with
    "opencv" albumentations' SmallestMaxSize and CenterCrop: they round the longer side and the offset differently.
    """
    opencv = resample == "opencv"
    resize = resize_as_opencv if opencv else partial(Image.Image.resize, resample=resample)
    if crop == "squash":
        return image if image.size == (size, size) else resize(image, (size, size))
    if crop == "resized":
        return resize(image.crop(random_box(*image.size, scale, rng)), (size, size))
    short = min(image.size)
    if short != size:
        width, height = (round(size * side / short) if opencv else size * side // short for side in image.size)
        image = resize(image, (width, height))
    width, height = image.size
    if crop == "random":
        left, top = rng.randint(0, width - size), rng.randint(0, height - size)
    else:
        left, top = ((side - size) // 2 if opencv else round((side - size) / 2) for side in image.size)
    return image if width == height else image.crop((left, top, left + size, top + size))


def resize_as_opencv(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """To (width, height) by the two nearest pixels of each axis, without antialiasing, as OpenCV does it in 8 bits:
    weights are multiples of 1/2048, and so on to the last bit. IBQ was trained and evaluated on such images.
    """
    pixels = np.asarray(image)
    (left, right, right_share), (top, bottom, bottom_share) = (
        _neighbours(new, old) for new, old in zip(size, image.size, strict=True)
    )
    if pixels.dtype != np.uint8:  # 16-bit grey
        across, down = (share.astype(np.float32) / 2048 for share in (right_share, bottom_share[:, None]))
        rows = pixels[top] + (pixels[bottom] - pixels[top]) * down
        return Image.fromarray(rows[:, left] + (rows[:, right] - rows[:, left]) * across)
    pixels, across, down = pixels.astype(np.int32), right_share[:, None], bottom_share[:, None, None]
    rows = (pixels[:, left] * (2048 - across) + pixels[:, right] * across) >> 4
    mixed = (((2048 - down) * rows[top]) >> 16) + ((down * rows[bottom]) >> 16)
    return Image.fromarray(((mixed + 2) >> 2).astype(np.uint8))


def _neighbours(new: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of the new pixels of an axis the two old ones around it, and 2048 times the share of the second."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = np.rint((place - first) * 2048).astype(np.int32)  # kept beyond the edge, where both are the last pixel
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), share


def collate(samples: Iterable[dict], size: int, buffers: dict[str, np.ndarray]) -> dict:
    """Up to `size` samples: pictures in one array a field, in `buffers[field]` if that fits; everything else in lists.

    A sample is copied to its place before the next one is made, so that they are all made in the same warm memory.
    """
    batch = {}
    for n, sample in enumerate(samples):
        for name, value in sample.items():
            if not isinstance(value, np.ndarray):
                batch.setdefault(name, []).append(value)
                continue
            if name not in batch:
                buffer = buffers.get(name)
                fits = buffer is not None and buffer.shape[1:] == value.shape and buffer.dtype == value.dtype
                batch[name] = buffer if fits else np.empty((size, *value.shape), value.dtype)
            if batch[name].shape[1:] != value.shape:
                one, other = (f"{s[-2]}x{s[-1]}" for s in (batch[name].shape, value.shape))
                raise ZooError(f"pictures of {one} and {other} are no batch: give an image_size, or batch_size=1")
            if value.dtype != batch[name].dtype:  # 16-bit grey among 8-bit colour
                batch[name], value = to_float(batch[name]), to_float(value)
            batch[name][n] = value
    return batch


def to_float(pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A copy in [0, 1] of pictures in bytes or in floats."""
    return np.divide(pixels, np.float32(255 if pixels.dtype == np.uint8 else 1), out=out)


def _open(suffix: str, data: bytes, max_pixels: int, upright: bool = False) -> Image.Image:
    if not data:
        raise BadSample(f"{suffix!r} is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats(suffix.rpartition(".")[2]))
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, over max_pixels={max_pixels:,}")
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception as error:  # for broken files Pillow's decoders raise nearly everything there is
        raise BadSample(f"{suffix!r} is no whole picture ({str(error) or type(error).__name__})") from None
    return image


@cache
def _formats(kind: str) -> list[str]:
    """The formats of IMAGE_SUFFIXES, that which the name of the file promises first: they are tried one after another.

    Not all of Pillow's, of which EPS would start Ghostscript on a program in the file.
    """
    formats = Image.registered_extensions()
    return [formats[f".{kind}"], *{formats[f".{suffix}"]: None for suffix in IMAGE_SUFFIXES}]


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and (values.min() < 0 or values.max() > 65535)):
        raise BadSample(f"a picture of mode {image.mode} with more than 16 bits has no known range")
    return values.astype(np.float32) / 65535


def _picture(raw: dict, field: str, stems: tuple[str, ...]) -> tuple[str, bytes]:
    for suffix, data in raw.items():
        stem, _, kind = suffix.rpartition(".")
        if stem in stems and (kind in IMAGE_SUFFIXES or suffix == "depth.npz"):
            return suffix, data
    raise BadSample(f"no {field!r} among {_content(raw, {})}")


def _array(suffix: str, data: bytes) -> np.ndarray:
    try:
        return as_numbers(read_npy(data))
    except (ValueError, OverflowError) as error:
        raise BadSample(f"{suffix!r} is no whole array ({error})") from None


def _tokens(raw: dict, mirrored: bool) -> dict[str, np.ndarray]:
    if "__tokens__" not in raw:
        raise ZooError("tokens are read from a folder of `zoo pretokenize`: data=tokens data.path=FOLDER")
    return {name: array[0] for name, array in raw["__tokens__"]([raw], [int(mirrored)]).items()}


def read_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file, whose header must not promise more than there is: it is believed."""
    shape, order, dtype, start = npy_header(data)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"{len(data) - start} bytes for an array {shape} of {dtype}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)


def npy_header(data: bytes) -> tuple[tuple[int, ...], str, np.dtype, int]:
    """Shape, order, type and beginning of the numbers of a .npy file. Raises ValueError for what is none."""
    size = {b"\1": 2, b"\2": 4}.get(data[6:7])
    if not data.startswith(b"\x93NUMPY") or size is None:
        raise ValueError("no .npy file of version 1 or 2")
    start = 8 + size + int.from_bytes(data[8 : 8 + size], "little")
    return *_parsed(data[:start]), start


@lru_cache(maxsize=64)  # a data set has few, and to parse one takes longer than to read an array
def _parsed(header: bytes) -> tuple[tuple[int, ...], str, np.dtype]:
    file, form = io.BytesIO(header), np.lib.format
    read = form.read_array_header_1_0 if form.read_magic(file) == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Python objects, which are not read")
    return shape, "F" if fortran else "C", dtype


def as_numbers(array: np.ndarray) -> np.ndarray:
    """A stored array as torch has such: bool, int64 or float32. Two bytes without a type are bfloat16, as ml_dtypes
    and its users write it into .npy files, for which numpy has no name."""
    if array.dtype == np.dtype("V2"):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype({"i": np.int64, "u": np.int64, "f": np.float32}.get(array.dtype.kind, array.dtype), copy=False)


def _record(data: bytes) -> dict:
    record = json.loads(data)
    if not isinstance(record, dict):
        raise ValueError(f"the member 'json' is no object but {type(record).__name__}")
    return record


def _content(raw: dict, record: dict) -> str:
    names = [suffix for suffix in raw if not suffix.startswith("__")]
    return f"its members {', '.join(names)}" + f" (with {', '.join(record)})" * bool(record)
