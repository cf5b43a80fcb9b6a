import io
import random

import numpy as np
import pytest
import torch
from data_helpers import encode
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from zoo.data import Loader, folder, images
from zoo.data.images import Decoder, collate, random_box, to_float
from zoo.data.sources import BadSample
from zoo.errors import ZooError


def decode(raw: dict[str, bytes], field: str = "image", depth="relative", squash=False, rng=None, **options):
    sample = Decoder([field], **options)({"__key__": "k", "__url__": "u", **raw}, depth, squash, rng)[field]
    return torch.from_numpy(to_float(sample)) if isinstance(sample, np.ndarray) else sample


def ramp(shape, low=0, high=255, dtype=np.uint8) -> np.ndarray:
    return np.linspace(low, high, int(np.prod(shape))).reshape(shape).astype(dtype)


def test_a_picture_that_fits_is_its_bytes_over_255():
    pixels = ramp((8, 8, 3))
    tensor = decode({"png": encode(Image.fromarray(pixels))}, image_size=8)
    np.testing.assert_array_equal(tensor, pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def test_kinds_of_pictures_become_rgb():
    gray = ramp((4, 6))
    as_rgb = np.broadcast_to(gray / np.float32(255), (3, 4, 6))
    np.testing.assert_array_equal(decode({"png": encode(Image.fromarray(gray))}), as_rgb)
    sixteen = ramp((4, 6), high=65535, dtype=np.uint16)
    np.testing.assert_array_equal(
        decode({"png": encode(Image.fromarray(sixteen))}), np.broadcast_to(sixteen / np.float32(65535), (3, 4, 6))
    )
    one_bit = Image.fromarray(gray).convert("1")
    assert decode({"png": encode(one_bit)}).unique().tolist() == [0, 1]
    palette = Image.fromarray(ramp((4, 6, 3))).quantize(16)
    np.testing.assert_array_equal(
        decode({"png": encode(palette)}) * 255, np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )
    ink = Image.merge("CMYK", [Image.new("L", (6, 4), value) for value in (255, 0, 0, 0)])
    torch.testing.assert_close(decode({"tiff": encode(ink, "TIFF")})[:, 0, 0], torch.tensor([0.0, 1.0, 1.0]))
    cmyk_jpeg = decode({"jpg": encode(ink, "JPEG")})[:, 2, 2]
    assert cmyk_jpeg[0] < 0.1 < 0.9 < cmyk_jpeg[1]


def test_transparency_lies_over_white():
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    torch.testing.assert_close(decode({"png": encode(half)})[:, 0, 0], torch.tensor([255.0, 127, 127]) / 255)
    gray = Image.new("LA", (2, 2), (0, 0))
    assert decode({"png": encode(gray)}).eq(1).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putdata([0, 1])
    assert decode({"png": encode(palette, transparency=0)})[:, 0].T.tolist() == [[1, 1, 1], [1, 0, 0]]
    colour_key = encode(Image.new("RGB", (2, 2), (10, 20, 30)), transparency=(10, 20, 30))
    assert decode({"png": colour_key}).eq(1).all()


def test_an_exif_rotation_is_applied():
    image = Image.fromarray(ramp((4, 6, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = np.rot90(np.asarray(image), -1).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode({"png": encode(image, exif=exif)}) * 255, upright)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode({"gif": data})[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("size", [(31, 20), (20, 45), (7, 9), (16, 40), (19, 16), (16, 21)])
def test_the_centre_crop_is_that_of_torchvision(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = F.center_crop(F.resize(image, 16, F.InterpolationMode.BICUBIC), 16)
    np.testing.assert_array_equal(
        decode({"png": encode(image)}, image_size=16), np.asarray(expected).transpose(2, 0, 1) / np.float32(255)
    )


def test_images_are_resized_as_asked():
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8))
    for name, resample in (("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)):
        expected = np.asarray(picture.resize((16, 16), resample)).transpose(2, 0, 1)
        found = decode({"png": encode(picture)}, image_size=16, interpolation=name)
        np.testing.assert_array_equal(found, expected / np.float32(255))
    with pytest.raises(ZooError, match="did you mean bilinear"):
        Decoder(image_size=16, interpolation="bilinaer")


def bilinear(pixels, size):
    """Without antialiasing, in float."""
    values = torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0)[None]
    return torch.nn.functional.interpolate(values, size, mode="bilinear")[0].numpy()


def test_resizing_as_opencv_is_bilinear_to_a_level():
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    for size in (16, 45):
        found = decode({"png": encode(Image.fromarray(pixels))}, image_size=size, crop="squash", interpolation="opencv")
        assert np.abs(255 * found.numpy() - bilinear(pixels, (size, size))).max() <= 1
    grey = (pixels[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    found = decode({"png": encode(Image.fromarray(grey))}, image_size=16, crop="squash", interpolation="opencv")
    np.testing.assert_allclose(255 * found, bilinear(pixels[..., :1], (16, 16)).repeat(3, 0), atol=1e-3)


def test_the_centre_crop_of_opencv_rounds_the_longer_side_to_the_nearest():
    pixels = np.zeros((9, 16, 3), np.uint8)
    pixels[:, 8:] = 255  # 14.2 pixels wide at a height of 8: 14, and 3 of them are cut off at the left
    found = decode({"png": encode(Image.fromarray(pixels))}, image_size=8, interpolation="opencv")
    assert found[0, 4].tolist() == [0] * 4 + [1] * 4
    crops = [
        decode({"png": encode(Image.fromarray(ramp((9, 16, 3))))}, image_size=8, crop="random", interpolation="opencv",
               rng=random.Random(seed)) for seed in range(9)
    ]  # fmt: skip
    assert len({crop.sum().item() for crop in crops}) > 2


@pytest.mark.parametrize("crop", ["random", "resized"])
def test_a_random_crop_is_a_function_of_its_seed(crop):
    data = {"png": encode(Image.fromarray(ramp((40, 60, 3))))}
    crops = [decode(data, image_size=16, crop=crop, flip=True, rng=random.Random(seed)) for seed in (0, 0, 1, 2, 3)]
    assert crops[0].equal(crops[1])
    assert not any(crops[0].equal(other) for other in crops[2:])
    wide = {"png": encode(Image.new("RGB", (300, 8), "red"))}  # no aspect ratio from 3/4 to 4/3 has such an area
    assert decode(wide, image_size=16, crop=crop, rng=random.Random(0)).shape == (3, 16, 16)


def test_a_resized_crop_is_a_box_of_pixels_scaled_as_torchvision_does(monkeypatch):
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 56, 3)).astype(np.uint8))
    expected = F.resized_crop(picture, 2, 5, 37, 40, [24, 24], F.InterpolationMode.BICUBIC)
    monkeypatch.setattr(images, "random_box", lambda *arguments: (5, 2, 45, 39))
    found = decode({"png": encode(picture)}, image_size=24, crop="resized", rng=random.Random(0))
    np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1) / np.float32(255))


def test_random_boxes_have_the_share_and_the_aspect_ratio_asked_for():
    rng = random.Random(0)
    boxes = [random_box(400, 360, (0.5, 0.9), rng) for _ in range(1000)]
    sizes = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes])
    shares, ratios = sizes.prod(1) / (400 * 360), sizes[:, 0] / sizes[:, 1]
    assert 0.498 < shares.min() < 0.51 < 0.89 < shares.max() < 0.902
    assert 0.745 < ratios.min() < 0.78 < 1.3 < ratios.max() < 1.34
    left, top, right, bottom = np.array(boxes).T
    assert left.min() == top.min() == 0
    assert (right.max(), bottom.max()) == (400, 360)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (300, 8), (7, 90), (1, 1)])
def test_where_no_such_box_is_found_it_is_that_of_torchvision(size):
    picture = Image.new("RGB", size)
    top, left, height, width = RandomResizedCrop.get_params(picture, [0.95, 1], [3 / 4, 4 / 3])
    assert random_box(*size, (0.95, 1), random.Random(0)) == (left, top, left + width, top + height)


def test_stored_depth_is_taken_as_it_is_and_squashed_without_mixing():
    values = np.random.default_rng(0).integers(0, 256, (6, 10), dtype=np.uint8)
    data = {"depth.png": encode(Image.fromarray(np.stack([values, values // 2, values // 3], -1)))}
    np.testing.assert_array_equal(decode(data, "depth")[0], values / np.float32(255))
    squashed = np.asarray(Image.fromarray(values).resize((4, 4), Image.NEAREST)) / np.float32(255)
    np.testing.assert_array_equal(decode(data, "depth", squash=True, image_size=4)[0], squashed)
    sixteen = ramp((6, 10), high=65535, dtype=np.uint16)
    np.testing.assert_array_equal(
        decode({"depth.png": encode(Image.fromarray(sixteen))}, "depth")[0], sixteen / np.float32(65535)
    )


def test_distance_becomes_inverse_depth_over_the_range_of_the_picture():
    metres = np.array([[1000, 2000], [4000, 0]], np.uint16)  # 0 is unknown
    depth = decode({"depth.png": encode(Image.fromarray(metres))}, "depth", depth="distance")
    torch.testing.assert_close(depth, torch.tensor([[[1, 1 / 3], [0, 0]]]))
    flat = decode({"depth.png": encode(Image.fromarray(np.full((2, 2), 7, np.uint16)))}, "depth", depth="distance")
    assert flat.eq(0).all()


def test_disparity_is_scaled_and_its_unknown_pixels_are_far():
    file = io.BytesIO()
    np.savez(file, np.array([[10, 30], [np.inf, 20]], np.float32))
    depth = decode({"depth.npz": file.getvalue()}, "depth", depth="disparity")
    assert depth.tolist() == [[[0, 1], [0, 0.5]]]


def test_only_what_is_asked_for_is_decoded():
    raw = {"rgb.webp": b"broken", "depth.png": encode(Image.new("L", (2, 2), 255)), "json": b"broken", "cls": b"7"}
    assert decode(raw, "depth").eq(1).all()
    assert decode(raw, "class") == 7


def test_text_comes_from_a_member_or_from_the_json():
    raw = {"json": b'{"caption": "inside", "boxes": [[1, 2]]}'}
    assert decode(raw, "caption") == "inside"
    assert decode(raw, "boxes") == [[1, 2]]
    assert decode(raw | {"txt": b"beside"}, "caption") == "beside"
    assert decode(raw | {"note.txt": b"a note"}, "note") == "a note"


@pytest.mark.parametrize(
    ("raw", "field", "reason"),
    [
        ({"jpg": encode(Image.new("RGB", (64, 64)), "JPEG")[:-40]}, "image", "no whole picture"),
        ({"png": b"hello"}, "image", "no whole picture"),
        ({"png": b""}, "image", "is empty"),
        ({"txt": b"hello"}, "image", "no 'image' among its members txt"),
        ({"png": b""}, "depth", "no 'depth' among its members png"),
        ({"json": b"{"}, "caption", "'caption' cannot be read"),
        ({"txt": b"\xff"}, "caption", "'caption' cannot be read"),
        ({"cls": b"cat"}, "class", "'class' cannot be read"),
        ({"tiff": encode(Image.new("F", (2, 2)), "TIFF")}, "image", "no known range"),
        ({"depth.npz": b"hello"}, "depth", "is no array"),
        ({"depth.png": encode(Image.new("I;16", (2, 2)))}, "depth", "nowhere known"),
    ],
)
def test_a_bad_sample_says_its_name_and_what_is_wrong(raw, field, reason):
    with pytest.raises(BadSample) as error:
        decode(raw, field, depth="distance")
    assert error.value.args[0] == "u: k"
    assert reason in error.value.args[1]


def test_a_decompression_bomb_is_a_bad_sample(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="bomb"):
        decode({"png": encode(Image.new("L", (20, 20)))})


def test_a_batch_of_bytes_and_floats_is_exact():
    pixels, deep = ramp((2, 2, 3)), np.full((2, 2), 21845, np.uint16)
    raws = [{"png": encode(Image.fromarray(image))} for image in (pixels, deep)]
    samples = [Decoder()({"__key__": "k", "__url__": "u", **raw}, "relative", False) for raw in raws]
    batch = collate(iter(samples), 2, {})["image"]
    np.testing.assert_array_equal(batch[0], pixels.transpose(2, 0, 1) / np.float32(255))
    np.testing.assert_array_equal(batch[1], np.full((3, 2, 2), 21845 / np.float32(65535)))


def test_pictures_of_different_sizes_are_no_batch():
    samples = [{"image": np.zeros((3, 4, width))} for width in (4, 5)]
    with pytest.raises(ZooError, match="4x4 and 4x5 are no batch: give an image_size"):
        collate(samples, 2, {})


@pytest.mark.parametrize("training", [True, False])
def test_a_squashed_picture_is_whole_in_training_and_in_evaluation(training, tmp_path):
    """Each side is scaled by itself, as torchvision's Resize to (size, size) does."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    options = {"image_size": 8, "crop": "squash", "interpolation": "bilinear", "batch_size": 1, "training": training}
    batch = next(iter(Loader(folder(tmp_path), **options)))
    expected = F.resize(Image.fromarray(pixels), [8, 8], F.InterpolationMode.BILINEAR)
    assert torch.equal(batch["image"][0], F.to_tensor(expected))
