"""Counts of tokens and codes, and the thumbnail that has as many numbers."""

import pytest
import torch

from zoo.metrics.thumbnail import thumbnail, thumbnail_shape
from zoo.metrics.tokens import TokenStatistics, numbers
from zoo.tokenizer import TokenizerInfo, Tokens


def info(**changes):
    kept = {"kind": "discrete", "streams": ("image",), "codebook_sizes": {"image": 16}} | changes
    return TokenizerInfo("test", "", image_size=8, size_multiple=None, channels=3, max_tokens=10, **kept)


def statistics(info, *batches):
    metric = TokenStatistics(info)
    for tokens in batches:
        metric.update(tokens)
    return {name: value.item() for name, value in metric.compute().items()}


def test_uniform_use_has_the_perplexity_of_the_codebook():
    values = statistics(info(), Tokens({"image": torch.arange(8)[None]}), Tokens({"image": torch.arange(8, 16)[None]}))
    assert values["perplexity/image"] == pytest.approx(16)
    assert values["codebook_use/image"] == 1
    assert values["bits"] == 8 * 4


def test_a_single_code_has_perplexity_one():
    values = statistics(info(), Tokens({"image": torch.full((2, 5), 3)}))
    assert values["perplexity/image"] == pytest.approx(1)
    assert values["codebook_use/image"] == 1 / 16


def test_only_live_tokens_count():
    mask = torch.arange(10) < torch.arange(1, 11)[:, None]  # 1 to 10 tokens
    ids = torch.where(mask, 0, 9)
    values = statistics(info(variable_length=True), Tokens({"image": ids}, mask=mask))
    assert values["codebook_use/image"] == 1 / 16
    assert (values["tokens_mean"], values["tokens_p10"], values["tokens_p90"]) == (5.5, 1, 9)
    assert values["bits"] == 5.5 * 4 + 10  # and which of 10 are live


def test_levels_and_streams_add_up():
    two = info(streams=("a", "b"), codebook_sizes={"a": 4, "b": 16}, levels={"b": 2})
    tokens = Tokens({"a": torch.zeros(1, 3, dtype=torch.int64), "b": torch.zeros(1, 3, 2, dtype=torch.int64)})
    values = statistics(two, tokens)
    assert values["tokens_mean"] == 3
    assert values["numbers"] == 9
    assert values["bits"] == 3 * (2 + 2 * 4)


def test_latents_count_as_they_are_stored():
    continuous = info(kind="continuous", codebook_sizes={}, latent_dims={"image": 6})
    values = statistics(continuous, Tokens(latents={"image": torch.zeros(1, 4, 6, dtype=torch.bfloat16)}))
    assert (values["numbers"], values["bits"]) == (24, 24 * 16)


@pytest.mark.parametrize(
    ("count", "channels", "size", "shape"),
    [
        (64, 1, (64, 64), (8, 8)),
        (100, 1, (320, 320), (10, 10)),
        (256, 3, (256, 256), (9, 9)),
        (128, 1, (32, 64), (8, 16)),
        (2, 3, (64, 64), (1, 1)),
        (10_000, 1, (16, 16), (16, 16)),
    ],
)
def test_the_thumbnail_has_no_more_numbers_than_promised(count, channels, size, shape):
    assert thumbnail_shape(count, channels, *size) == shape


def test_each_image_gets_the_thumbnail_of_its_own_tokens():
    images = torch.rand(3, 3, 16, 16)
    mask = torch.arange(256) < torch.tensor([12, 256, 12])[:, None]
    kept = numbers(Tokens({"image": torch.zeros(3, 256, 3, dtype=torch.int64)}, mask=mask))
    restored, used = thumbnail(images, kept)
    assert kept.tolist() == [36, 768, 36]
    assert used.tolist() == [36, 768, 36]
    assert torch.allclose(restored[1], images[1], atol=1e-6)  # as many numbers as it has
    assert torch.equal(restored[2], thumbnail(images[2:], kept[2:])[0][0])
    assert restored.min() >= 0
    assert restored.max() <= 1
