"""What a file format leaves of images."""

from __future__ import annotations

import io
from collections.abc import Callable

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
    return files(cut_off(2 * images - 1), "JPEG", quality=95)[0].to(images)


def files(images: Tensor, form: str, side: int | None = None, **options) -> tuple[Tensor, list[int]]:
    """What files of a format of Pillow give back of images (B, 1 or 3, H, W) uint8, float32 in [0, 1], and their bytes.

    side: of the shorter side in pixels to which they are first made smaller, and from which they come back, bicubic;
    the sizes are those of whole files, headers included. options: of the format.
    """
    restored, sizes = [], []
    for pixels in images.movedim(1, -1).cpu().numpy():
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        mode, whole, file = image.mode, image.size, io.BytesIO()
        if side is not None and side < min(whole):
            image = image.resize([max(round(one * side / min(whole)), 1) for one in whole], Image.Resampling.BICUBIC)
        image.save(file, form, **options)
        sizes.append(file.tell())
        image = Image.open(file).convert(mode)
        back = np.asarray(image if image.size == whole else image.resize(whole, Image.Resampling.BICUBIC), np.float32)
        restored.append(back.reshape(pixels.shape).transpose(2, 0, 1) / 255)
    return torch.from_numpy(np.stack(restored)), sizes


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"png": png, "jpeg": jpeg}
