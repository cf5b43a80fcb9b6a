import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics import Metric

from zoo.metrics.base import Row
from zoo.metrics.storage import png


def thumbnail_shape(numbers: int, channels: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the thumbnail: height * width * channels <= numbers, the aspect ratio kept as it can be.

    One pixel at least, and no more than the image has.
    """
    pixels = max(numbers // channels, 1)
    columns = min(max(int((pixels * width / height) ** 0.5), 1), width)
    return min(pixels // columns, height), columns


def thumbnail(images: Tensor, numbers: Tensor, in_bytes: bool = False) -> tuple[Tensor, Tensor]:
    """The baseline of a tokenizer: each image by a bicubic thumbnail with as many numbers as its tokens hold.

    Takes images (B, C, H, W) in [0, 1] and how many numbers each may keep, (B,). Returns the thumbnails scaled up
    again, (B, C, H, W) in [0, 1], and how many numbers they have, (B,). A number of the thumbnail is a float while an
    id has a few bits: the baseline is given more than the tokenizer, and a tokenizer worth its name is above it. With
    in_bytes each number is rounded to one of 256 values.
    """
    restored, used = torch.empty_like(images), torch.empty_like(numbers)
    channels, height, width = images.shape[1:]
    for count in numbers.unique().tolist():
        chosen = numbers == count
        shape = thumbnail_shape(count, channels, height, width)
        small = interpolate(images[chosen], shape, mode="bicubic", antialias=True)
        if in_bytes:
            small = png(small.clamp(0, 1))
        restored[chosen] = interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
        used[chosen] = small[0].numel()
    return restored, used


class ThumbnailSize(Metric):
    """Numbers and bits of the thumbnails, each number a 32-bit float."""

    rows = (Row("numbers", "numbers per image", "", ".5g"), Row("bits", "bits per image", "", ".5g"))
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("numbers", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, used: Tensor) -> None:
        self.numbers += used.sum()
        self.images += len(used)

    def compute(self) -> dict[str, Tensor]:
        return {"numbers": self.numbers / self.images, "bits": 32 * self.numbers / self.images}
