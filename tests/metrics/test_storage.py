import io

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.metrics.storage import cut_off, jpeg, png

IMAGES = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0))


def test_png_keeps_bytes():
    assert torch.equal(png(IMAGES), torch.from_numpy((IMAGES.numpy() * 255).round().astype(np.uint8)) / 255)


def test_what_is_cut_off_is_clamped_and_not_rounded():
    assert cut_off(torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 1.2])).tolist() == [0, 0, 127, 254, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_a_file_of_quality_95_gives_back(channels):
    images = IMAGES[:, :channels]
    for image, back in zip(images, jpeg(images), strict=True):
        pixels, file = (image * 255).byte().movedim(0, -1).numpy(), io.BytesIO()
        Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "JPEG", quality=95)
        expected = torch.from_numpy(np.array(Image.open(file))).view(24, 16, channels).movedim(-1, 0) / 255
        torch.testing.assert_close(back, expected, rtol=0, atol=2 / 255)
        assert not torch.equal(back, image)
