"""What images become when an ordinary codec has as many bits for them as a tokenizer takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.distributed import sum_over_ranks
from zoo.errors import ZooError
from zoo.metrics.storage import from_files, to_files
from zoo.metrics.thumbnail import thumbnail, thumbnail_shape

NAMES = {"thumbnail": "thumbnail", "jpeg": "JPEG", "webp": "WebP"}
QUALITIES = {"jpeg": range(1, 96), "webp": range(101)}
OPTIONS = {"jpeg": {"optimize": True}, "webp": {"method": 6}}


class TooFew(ZooError):
    """A codec needs more bits than there are."""


class Fit(NamedTuple):
    """A codec with the settings that it has for some number of bits."""

    settings: dict
    bits: float
    """Mean over all images, at most those that were asked for."""
    apply: Callable[[Tensor], Tensor]
    """Images (B, C, H, W) uint8 to what comes back of them, float in [0, 1]."""


class Thumbnail:
    """A small picture, each number of it a byte, scaled up again."""

    def __init__(self, shape: Sequence[int]):
        self.shape = shape

    def fit(self, bits: float) -> Fit:
        channels = self.shape[0]
        numbers = int(bits) // 8
        if numbers < channels:
            raise TooFew(f"a thumbnail of one pixel takes {8 * channels} bits.")
        rows, columns = thumbnail_shape(numbers, *self.shape)

        def apply(images: Tensor) -> Tensor:
            return thumbnail(images / 255, torch.full((len(images),), numbers, device=images.device), in_bytes=True)[0]

        return Fit({"pixels": f"{rows} x {columns}"}, 8.0 * rows * columns * channels, apply)


class Files:
    """Files of a format, all of one quality, of the images as they are or made smaller first.

    Whole files count, headers and all.
    """

    def __init__(self, form: str, shape: Sequence[int], batches: Sequence[Tensor], device: torch.device):
        self.form, self.batches, self.device = form, batches, device
        self.bits, self.psnr = cache(self._bits), cache(self._psnr)
        shorter = min(shape[-2:])
        sides = {round(shorter * share / 2**k) for k in range(16) for share in (1, 0.75)}
        self.sides = sorted((side for side in sides if side > 0), reverse=True)

    def fit(self, bits: float) -> Fit:
        """The side and the quality whose files take at most that many bits in the mean and have the highest PSNR.

        Sides are tried from the whole one downwards while PSNR rises. Raises TooFew where no file is that small.
        """
        best = None
        for side in self.sides:
            if (quality := self.quality(side, bits)) is None:
                continue
            found = self.psnr(side, quality), side, quality
            if best and found[0] <= best[0]:
                break
            best = found
        if best is None:
            least = min(self.bits(side, QUALITIES[self.form][0]) for side in self.sides)
            raise TooFew(f"no {NAMES[self.form]} file is that small: headers included, the least is {least:,.0f} bits.")
        _, side, quality = best
        settings = {"side": side, "quality": quality}
        return Fit(
            settings, self.bits(side, quality), lambda images: from_files(self.files(images, side, quality), images)
        )

    def quality(self, side: int, bits: float) -> int | None:
        """The highest whose files take at most that many bits, by bisection, None where there is none."""
        low, high = QUALITIES[self.form][0], QUALITIES[self.form][-1]
        if self.bits(side, low) > bits:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bits(side, middle) <= bits else (low, middle - 1)
        return low

    def files(self, images: Tensor, side: int, quality: int) -> list[bytes]:
        return to_files(images, self.form, side, quality=quality, **OPTIONS[self.form])

    def _bits(self, side: int, quality: int) -> float:
        """Of an image."""
        return self._mean(lambda images: 8 * sum(map(len, self.files(images, side, quality))))

    def _psnr(self, side: int, quality: int) -> float:
        """Of an image, in dB."""

        def total(images: Tensor) -> float:
            errors = (from_files(self.files(images, side, quality), images) - images / 255).square().flatten(1).mean(1)
            return -10 * errors.double().clamp(min=1e-10).log10().sum().item()

        return self._mean(total)

    def _mean(self, total: Callable[[Tensor], float]) -> float:
        """Over the images of all ranks, from the total of each batch."""
        own = [sum(map(total, self.batches)), sum(map(len, self.batches))]
        value, count = sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=self.device))[0].tolist()
        return value / count


def codec(
    name: str, shape: Sequence[int], batches: Sequence[Tensor], device: torch.device | str = "cpu"
) -> Thumbnail | Files:
    """One of CODECS for images of a shape (C, H, W).

    batches: this rank's images, (B, C, H, W) uint8 each, to which it is fitted; device: on which ranks add up.
    """
    return Thumbnail(shape) if name == "thumbnail" else Files(name, shape, batches, torch.device(device))
