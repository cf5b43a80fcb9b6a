"""Images of every kind, right and wrong, into every tokenizer and encoder that comes with the zoo."""

import inspect

import numpy as np
import pytest
import torch
from fuzz_helpers import anything, attempt, fuzz, loaded, refused, shipped
from hypothesis import strategies as st
from PIL import Image

READERS = shipped("tokenizer", "encoder")
METHODS = "encode", "reconstruct", "features", "encode_image"
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
OTHERS = torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn
HUGE = 2**20, 2**31, 2**40


def noise(shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sides(info):
    """Sizes that are taken."""
    size, multiple = info.image_size, info.size_multiple
    fits = [(size, size)]
    return fits + ([(size, 2 * multiple), (multiple, size), (3 * multiple, multiple)] if multiple else [])


@st.composite
def right_images(draw, info):
    height, width = draw(st.sampled_from(sides(info)))
    count, dtype = draw(st.integers(1, 2)), draw(st.sampled_from(FLOATS))
    images = noise((count, info.channels, height, width), dtype, draw(st.integers(0, 9)))
    look = draw(st.sampled_from(["plain", "black", "white", "channels last", "expanded", "flipped", "graph", "part"]))
    return {
        "plain": lambda: images,
        "black": lambda: torch.zeros_like(images),
        "white": lambda: torch.ones_like(images),
        "channels last": lambda: images.to(memory_format=torch.channels_last),
        "expanded": lambda: images[:1, :, :1, :1].expand(images.shape),
        "flipped": lambda: images.transpose(2, 3).contiguous().transpose(2, 3),
        "graph": lambda: images.clone().requires_grad_(),
        "part": lambda: torch.cat([images, images])[::2],
    }[look]()


@st.composite
def wrong_images(draw, info):
    """What is no batch of images for this reader, and a word that the refusal has to say."""
    size, channels = info.image_size, info.channels
    good = noise((1, channels, size, size))
    kind = draw(st.sampled_from(["other", "object", "dtype", "shape", "empty", "size", "value", "enormous", "layout"]))
    if kind == "other":
        value = draw(anything)
        return value, type(value).__name__
    if kind == "object":
        value = draw(
            st.sampled_from(
                [
                    good.numpy(),
                    good.tolist(),
                    [good, good],
                    (good,),
                    Image.new("RGB", (size, size)),
                    np.zeros((size, size, 3), np.uint8),
                    {"image": good},
                ]
            )
        )
        return value, type(value).__name__
    if kind == "dtype":
        dtype = draw(st.sampled_from(OTHERS))
        return good.to(dtype), str(dtype)
    if kind == "shape":
        shape = draw(st.lists(st.integers(1, 4), max_size=6).filter(lambda s: len(s) != 4 or s[1] != channels))
        return torch.rand(shape), str(tuple(shape))
    if kind == "empty":
        shape = [1, channels, size, size]
        shape[draw(st.integers(0, 3))] = 0
        return torch.rand(shape), str(tuple(shape))
    if kind == "size":
        height, width = draw(st.tuples(st.integers(1, 130), st.integers(1, 130)).filter(lambda s: not fits(info, *s)))
        return torch.rand(1, channels, height, width), f"{height} x {width}"
    if kind == "value":
        value = draw(
            st.sampled_from([float("nan"), float("inf"), -float("inf"), 255.0, 1.01, -0.01])
            | st.floats(width=32).filter(lambda v: not 0 <= v <= 1)
        )
        good[0, draw(st.integers(0, channels - 1)), draw(st.integers(0, size - 1)), draw(st.integers(0, size - 1))] = (
            value
        )
        return good, "values from"
    if kind == "enormous":  # strides of 0: the test itself has one value
        count, height, width = (
            draw(st.sampled_from([1, 8])),
            draw(st.sampled_from(HUGE)) if draw(st.booleans()) else size,
            draw(st.sampled_from(HUGE)),
        )
        if height == width == size:
            count = 2**40
        while count * channels * height * width >= 2**62:
            count, height = 1, max(height // 2, 8)
        return torch.zeros(1, 1, 1, 1).expand(count, channels, height, width), "x"
    return draw(
        st.sampled_from(
            [good.to_sparse(), good.to("meta"), torch.nested.as_nested_tensor(list(good), layout=torch.jagged)]
        )
    ), "dense"


def fits(info, height, width):
    size, multiple = info.image_size, info.size_multiple
    if multiple:
        return height % multiple == 0 and width % multiple == 0
    return height == size and width in (size, 2 * size)  # KARL's, alone, takes twice the width


def methods(reader):
    """Of these, the ones that the reader has for images."""
    return [name for name in METHODS if hasattr(reader, name)]


@pytest.mark.parametrize(("kind", "name"), READERS)
@fuzz(data=st.data())
def test_wrong_images_are_refused(kind, name, data):
    reader = loaded(kind, name)
    images, word = data.draw(wrong_images(reader.info))
    method = data.draw(st.sampled_from(methods(reader)))
    refused(getattr(reader, method), images, says=[name, word])


@pytest.mark.parametrize(("kind", "name"), READERS)
@fuzz(data=st.data())
def test_right_images_are_taken(kind, name, data):
    reader = loaded(kind, name)
    images = data.draw(right_images(reader.info))
    slow = {"reconstruct"} if reader.info.system == "seed" else set()  # its decoder is a diffusion model
    method = data.draw(st.sampled_from([one for one in methods(reader) if one not in slow]))
    made = attempt(getattr(reader, method), images)
    square = images.shape[2] == images.shape[3]  # of others some, as MingTok says, have features and no pixels
    if method == "encode" or (method == "reconstruct" and square):
        assert made is not None
        assert len(made) == len(images)
    if isinstance(made, torch.Tensor):
        assert made.isfinite().all()
        assert not made.requires_grad
    if method == "reconstruct" and made is not None:
        assert made.shape == images.shape
        assert 0 <= made.min() <= made.max() <= 1


@pytest.mark.parametrize(("kind", "name"), READERS)
@fuzz(data=st.data())
def test_settings_of_any_type_are_taken_or_refused(kind, name, data):
    reader = loaded(kind, name)
    method = data.draw(st.sampled_from([m for m in ("_encode", "_features", "_encode_image") if hasattr(reader, m)]))
    known = list(inspect.signature(getattr(reader, method)).parameters)[1:]
    settings = data.draw(st.dictionaries(st.sampled_from(known), anything, max_size=2)) if known else {}
    attempt(getattr(reader, method[1:]), noise((1, reader.info.channels, 64, 64)), **settings)


@pytest.mark.parametrize(("kind", "name"), READERS)
@fuzz(texts=anything | st.lists(st.text(max_size=200), max_size=3))
def test_texts_are_taken_or_refused(kind, name, texts):
    embedded = attempt(loaded(kind, name).encode_text, texts)
    assert embedded is None or (len(embedded) == len(texts) and embedded.isfinite().all())
