"""What a file format leaves of images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def png(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded to 8 bits, half to even."""
    return (images * 255).round() / 255


def cut_off(values: Tensor) -> Tensor:
    """Values of pictures in [-1, 1], clamped, to 8 bits without rounding, as the authors of DualToken save them.

    This makes a byte that has become a float darker by one now and then.
    """
    return ((values + 1) * 127.5).clamp(0, 255).byte()


def jpeg(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [0, 1], `cut_off`, as JPEG files of quality 95 give them back: DualToken's rFID."""
    values = cut_off(2 * images - 1)
    return from_files(to_files(values, "JPEG", quality=95), values).to(images)


def to_files(images: Tensor, form: str, side: int | None = None, **options) -> list[bytes]:
    """Images (B, 1 or 3, H, W) uint8 as files of a format of Pillow, headers included.

    side: of the shorter side in pixels to which they are first made smaller, bicubic; options: of the format.
    """
    contents = []
    for pixels in images.movedim(1, -1).cpu().numpy():
        image, file = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), io.BytesIO()
        if side is not None and side < min(image.size):
            shape = [max(round(one * side / min(image.size)), 1) for one in image.size]
            image = image.resize(shape, Image.Resampling.BICUBIC)
        image.save(file, form, **options)
        contents.append(file.getvalue())
    return contents


def from_files(contents: Sequence[bytes], images: Tensor) -> Tensor:
    """What is in files of images, of the same shape, float32 in [0, 1]; smaller ones are made larger, bicubic."""
    channels, height, width = images.shape[1:]
    restored = []
    for content in contents:
        image = Image.open(io.BytesIO(content)).convert("L" if channels == 1 else "RGB")
        image = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
        restored.append(np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255)
    return torch.from_numpy(np.stack(restored)).to(images.device)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"png": png, "jpeg": jpeg}
