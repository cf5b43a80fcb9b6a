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
    values = cut_off(2 * images - 1).movedim(1, -1).cpu().numpy()
    return torch.from_numpy(np.stack([_through_a_file(one) for one in values])).to(images)


def _through_a_file(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) bytes to (C, H, W) float32 in [0, 1]."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "JPEG", quality=95)
    back = np.asarray(Image.open(file), np.float32) / 255
    return back.reshape(pixels.shape).transpose(2, 0, 1)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"png": png, "jpeg": jpeg}
