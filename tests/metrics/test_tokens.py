"""Counts of tokens and codes, and the thumbnail that has as many numbers."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zoo.metrics.thumbnail import thumbnail, thumbnail_shape
from zoo.metrics.tokens import TokenStatistics, image_entropies, numbers
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


def test_the_entropy_within_an_image_is_that_of_its_own_live_ids():
    ids = torch.randint(0, 16, (5, 12, 3), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([0, 1, 12, 5, 9])[:, None]
    share = torch.stack([one[live].flatten().bincount(minlength=16) for one, live in zip(ids, mask, strict=True)])
    share = share / share.sum(1, keepdim=True).clamp(min=1)
    expected = -(share * share.clamp(min=1e-9).log2()).sum(1)
    torch.testing.assert_close(image_entropies(ids, mask, 16).float(), expected)
    torch.testing.assert_close(image_entropies(ids[..., 0], mask, 16)[1:2], torch.zeros(1, dtype=torch.float64))


def test_images_that_differ_from_each_other_have_less_entropy_than_the_data_set():
    values = statistics(info(), Tokens({"image": torch.arange(8)[None]}), Tokens({"image": torch.zeros(3, 8).long()}))
    assert values["image_entropy/image"] == pytest.approx(3 / 4)  # 3 bits in one of four images


def statistics_of_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ids = torch.arange(24).view(4, 6) ** 2 % 16
    values = statistics(info(), Tokens({"image": ids[:3] if rank == 0 else ids[3:]}))
    torch.save(values, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_have_the_statistics_of_all_images(tmp_path):
    mp.spawn(statistics_of_rank, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other
    assert one == pytest.approx(statistics(info(), Tokens({"image": torch.arange(24).view(4, 6) ** 2 % 16})))


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
