import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from zoo.metrics.codecs import NAMES, OPTIONS, QUALITIES, TooFew, codec

SMOOTH = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
IMAGES = (interpolate(SMOOTH, 48, mode="bicubic").clamp(0, 1) * 255).round().byte()
BATCHES = IMAGES.split(4)


def made(name):
    return codec(name, IMAGES.shape[1:], BATCHES)


def psnr(restored):
    return -10 * (restored - IMAGES / 255).square().flatten(1).mean(1).log10().mean().item()


def by_hand(form, side, quality):
    """Mean bits of whole files, and what is in them."""
    bits, images = [], []
    for pixels in IMAGES.movedim(1, -1).numpy():
        image, file = Image.fromarray(pixels), io.BytesIO()
        if side < 48:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        image.save(file, form, quality=quality, **OPTIONS[form])
        bits.append(8 * len(file.getvalue()))
        images.append(np.asarray(Image.open(file).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)))
    return np.mean(bits), torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255


@pytest.mark.parametrize(("form", "bits"), [("jpeg", 3500), ("jpeg", 9000), ("webp", 900), ("webp", 4000)])
def test_files_are_the_best_that_have_at_most_as_many_bits(form, bits):
    fit = made(form).fit(bits)
    side, quality = fit.settings.values()
    mean, restored = by_hand(form, side, quality)
    assert fit.bits == pytest.approx(mean)
    assert fit.bits <= bits
    if quality < QUALITIES[form][-1]:
        assert by_hand(form, side, quality + 1)[0] > bits
    torch.testing.assert_close(fit.apply(IMAGES), restored)
    for other in {48, 24} - {side}:
        fitting = [q for q in QUALITIES[form][::12] if by_hand(form, other, q)[0] <= bits]
        if fitting:
            assert psnr(by_hand(form, other, fitting[-1])[1]) <= psnr(restored)


def test_images_are_made_smaller_where_whole_ones_are_too_large():
    webp = made("webp")
    assert webp.bits(48, 0) > 560
    assert webp.fit(560).settings["side"] < 48


def test_more_bits_are_never_worse():
    for name in NAMES:
        fits = [made(name).fit(bits) for bits in (2500, 5000, 12000)]
        assert sorted(psnr(fit.apply(IMAGES)) for fit in fits) == [psnr(fit.apply(IMAGES)) for fit in fits]


def test_a_thumbnail_has_a_byte_for_each_number():
    fit = made("thumbnail").fit(8 * 3 * 30 + 7)
    assert fit.settings == {"pixels": "6 x 5"}
    assert fit.bits == 8 * 3 * 30
    flat = torch.full((2, 3, 48, 48), 77, dtype=torch.uint8)
    torch.testing.assert_close(fit.apply(flat), flat / 255)


@pytest.mark.parametrize(("name", "bits"), [("thumbnail", 23), ("jpeg", 2000), ("webp", 300)])
def test_too_few_bits_are_said(name, bits):
    with pytest.raises(TooFew, match=r"\d bits\.$"):
        made(name).fit(bits)


def test_depth_maps_stay_grey():
    maps = IMAGES[:, :1]
    for name in NAMES:
        restored = codec(name, maps.shape[1:], [maps]).fit(6000).apply(maps)
        assert restored.shape == maps.shape
        assert (restored - maps / 255).abs().mean() < 0.05
