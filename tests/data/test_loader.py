import itertools
import logging
from pathlib import Path

import pytest
import torch
from data_helpers import keys, picture, write_tar

from zoo.data import Loader, folder, scenes, shards
from zoo.errors import ZooError


def ranks(source, world_size, **options) -> list[Loader]:
    return [Loader(source, image_size=8, rank=r, world_size=world_size, **options) for r in range(world_size)]


@pytest.mark.parametrize("counts", [(17,), (3, 9, 5), (1,) * 17], ids=["one shard", "three", "a sample each"])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (3, 1), (3, 5)])
def test_in_an_epoch_no_sample_comes_twice_and_every_rank_makes_the_same_number_of_steps(
    make_shards, counts, world_size, batch_size
):
    paths = make_shards(*counts)
    for epoch in range(2):
        seen = []
        for loader in ranks(paths, world_size, batch_size=batch_size, training=True):
            loader.load_state_dict({"epoch": epoch, "samples": 0})
            batches = list(loader)
            assert len(batches) == len(loader) == 17 // (world_size * batch_size)
            assert all(len(batch["key"]) == batch_size for batch in batches)
            seen += keys(batches)
        assert len(set(seen)) == len(seen)


def test_workers_do_not_change_what_comes(make_shards):
    paths = make_shards(7, 12, 4)
    for training, positions in ((True, (0, 3)), (False, (0,))):
        for position in positions:
            expected, *others = (
                Loader(paths, batch_size=3, image_size=8, training=training, num_workers=workers, seed=1)
                for workers in (0, 1, 2)
            )
            for loader in (expected, *others):
                loader.position = position
            epochs = [list(expected), list(expected)]
            for loader in others:
                for epoch in epochs:  # the workers live on in the second one
                    for batch, other in zip(epoch, loader, strict=True):
                        assert batch["key"] == other["key"]
                        torch.testing.assert_close(batch["image"], other["image"], rtol=0, atol=0)


def test_n_ranks_of_a_batch_see_what_one_rank_of_a_batch_n_times_larger_sees(make_shards):
    paths = make_shards(9, 14)
    (one,) = ranks(paths, 1, batch_size=6, training=True)
    several = ranks(paths, 3, batch_size=2, training=True)
    assert [batch["key"] for batch in one] == [
        [key for batch in batches for key in batch["key"]] for batches in zip(*several, strict=True)
    ]


def test_every_epoch_and_seed_has_an_order_of_its_own(make_shards):
    paths = make_shards(20, 20)
    loader = Loader(paths, batch_size=5, image_size=8, training=True)
    orders = [tuple(keys(loader)) for _ in range(3)]
    orders.append(tuple(keys(Loader(paths, batch_size=5, image_size=8, training=True, seed=1))))
    assert len(set(orders)) == 4
    assert {frozenset(order) for order in orders} == {frozenset(orders[0])}


def test_a_small_buffer_mixes_neighbours_only(make_shards):
    paths = make_shards(40)
    order = [int(k.split("-")[1]) for k in keys(Loader(paths, batch_size=4, training=True, shuffle_buffer=8))]
    blocks = [order[i : i + 8] for i in range(0, 40, 8)]
    assert [sorted(block) for block in blocks] == [list(range(i, i + 8)) for i in range(0, 40, 8)]
    assert order != sorted(order)


def test_short_epochs_go_through_everything_before_anything_comes_again(make_shards):
    loader = Loader(make_shards(8, 8), batch_size=2, training=True, samples_per_epoch=5)
    epochs = [keys(loader) for _ in range(6)]
    assert all(len(epoch) == 4 for epoch in epochs)
    for cycle in (epochs[:3], epochs[3:]):
        assert len(set(itertools.chain(*cycle))) == 12


def test_long_epochs_repeat_the_source_as_often_as_needed(make_shards):
    seen = keys(Loader(make_shards(4), batch_size=2, training=True, samples_per_epoch=10))
    assert sorted(seen.count(k) for k in set(seen)) == [2, 2, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_exactly(make_shards, workers):
    options = {"batch_size": 2, "image_size": 8, "training": True, "crop": "resized", "flip": True}
    paths = make_shards(7, 6)
    loader = Loader(paths, num_workers=workers, **options)
    batches = [*loader, *loader]
    for position in range(0, 12, 3 if workers else 1):
        first = Loader(paths, **options)
        for _ in itertools.islice(itertools.chain(first, first), position):
            pass
        resumed = Loader(paths, num_workers=workers, **options)
        resumed.load_state_dict(first.state_dict())
        for batch, expected in zip(resumed, batches[position:], strict=False):
            assert batch["key"] == expected["key"]
            torch.testing.assert_close(batch["image"], expected["image"], rtol=0, atol=0)


def test_a_run_can_be_resumed_on_another_number_of_ranks(make_shards):
    paths = make_shards(30)
    (one,) = ranks(paths, 1, batch_size=4, training=True)
    before = keys(itertools.islice(one, 3))
    after = []
    for loader in ranks(paths, 2, batch_size=2, training=True):
        loader.load_state_dict(one.state_dict())
        after += keys(itertools.islice(loader, len(loader) - 3))
    assert sorted(after) == sorted(keys(one)[: len(after)])
    assert not set(before) & set(after)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_kept_of_a_batch_is_not_overwritten_by_later_ones(make_shards, workers):
    loader = Loader(make_shards(40), batch_size=2, image_size=8, num_workers=workers)
    kept = torch.cat([part for _ in range(2) for part in [batch["image"][1:, 0, 0, 0] for batch in loader]])
    assert kept.mul(255).tolist() == 2 * list(range(1, 40, 2))


# --- mixes -----------------------------------------------------------------------------------------------------------


def test_a_mix_has_the_shares_of_its_weights_and_no_sample_more_often_than_another(make_shards):
    mix = [
        {"urls": make_shards(10, 10, name="a"), "weight": 3},
        {"urls": make_shards(30, name="b"), "weight": 1},
    ]
    loaders = ranks(mix, 2, batch_size=5, training=True, samples_per_epoch=40)
    seen = [key for loader in loaders for key in keys(loader)]
    assert sum(key[0] == "a" for key in seen) == 30
    assert len({key for key in seen if key[0] == "b"}) == 10
    assert sorted(seen.count(key) for key in {key for key in seen if key[0] == "a"}) == [1] * 10 + [2] * 10


def test_a_mix_without_weights_is_every_sample_once(make_shards):
    sources = [shards(make_shards(6, name="a")), shards(make_shards(4, 4, name="b"))]
    seen = keys(Loader(sources, batch_size=2, training=True))
    assert len(seen) == len(set(seen)) == 14
    assert "".join(key[0] for key in seen) not in ("a" * 6 + "b" * 8, "b" * 8 + "a" * 6)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_gives_every_sample_once_over_all_ranks_in_order(make_shards, world_size):
    paths = make_shards(3, 2)
    loaders = ranks([shards(paths[0]), shards(paths[1])], world_size, batch_size=2)
    assert [key for loader in loaders for key in keys(loader)] == [
        *(f"shard0-{i}" for i in range(3)),
        *(f"shard1-{i}" for i in range(2)),
    ]
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]


def test_evaluation_can_be_repeated(make_shards):
    loader = Loader(make_shards(5), batch_size=2, image_size=8, num_workers=1)
    next(iter(loader))
    assert keys(loader) == keys(loader) == [f"shard0-{i}" for i in range(5)]


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("counts", [(11,), (4, 1, 2, 1, 3, 2)], ids=["few shards", "many shards"])
def test_a_stream_is_divided_among_ranks_and_workers(make_shards, counts, workers):
    pipes = [f"pipe:cat {path}" for path in make_shards(*counts)]
    loaders = ranks(pipes, 2, batch_size=2, num_workers=workers)
    assert sorted(key for loader in loaders for key in keys(loader)) == sorted(keys(Loader(pipes, batch_size=1)))
    with pytest.raises(TypeError):
        len(loaders[0])
    loaders = ranks(pipes, 2, batch_size=1, num_workers=workers, training=True, samples_per_epoch=4)
    seen = [keys(loader) for loader in loaders]
    assert [len(s) for s in seen] == [2, 2]
    assert len(set(seen[0] + seen[1])) == 4


def test_a_stream_that_runs_out_is_repeated(make_shards):
    seen = keys(Loader(f"pipe:cat {make_shards(3)[0]}", batch_size=2, training=True, samples_per_epoch=6))
    assert sorted(seen) == sorted(2 * [f"shard0-{i}" for i in range(3)])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_stream_resumes_where_it_was(make_shards, mixed, tmp_path):
    source = [f"pipe:cat {path}" for path in make_shards(5, 6, 4)]
    write_tar(tmp_path / "broken.tar", [("good", {"png": picture(1)}), ("bad", {"png": b"no"})])
    source.append(f"pipe:cat {tmp_path}/broken.tar")
    if mixed:
        source = [{"urls": source, "weight": 0.6}, {"urls": make_shards(9, name="local"), "weight": 0.4}]
    options = {"batch_size": 2, "training": True, "samples_per_epoch": 16, "max_bad_share": 1, "shuffle_buffer": 3}
    for workers in (0, 2):
        full = Loader(source, num_workers=workers, **options)
        expected = [batch["key"] for batch in itertools.chain(full, full)]
        for position in (3, 6, 9):
            loader = Loader(source, num_workers=workers, **options)
            loader.position = position
            assert [batch["key"] for batch in loader][:7] == expected[position : position + 7]


# --- bad samples -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_folder(tmp_path):
    """150 pictures, of which one is cut off and one is empty."""
    for i in range(150):
        data = picture(i)
        (tmp_path / f"{i:03}.png").write_bytes({7: data[:50], 70: b""}.get(i, data))
    return folder(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_in_training_and_named_at_the_end_of_the_epoch(bad_folder, workers, caplog):
    loader = Loader(bad_folder, batch_size=10, image_size=8, training=True, num_workers=workers, max_bad_share=0.02)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    seen = keys(batches)
    assert len(seen) == 150
    assert {"007.png", "070.png"}.isdisjoint(seen)
    assert len(set(seen)) == 148
    (record,) = caplog.records
    assert "2 of 150" in record.message
    assert "007.png: 'png' is no whole picture" in record.message
    assert "070.png: 'png' is empty (0 bytes)" in record.message
    resumed = Loader(bad_folder, batch_size=10, image_size=8, training=True, max_bad_share=0.02)
    resumed.position = 4
    assert keys(itertools.islice(resumed, 11)) == seen[40:]


def test_bad_samples_are_left_out_of_evaluation(bad_folder):
    assert len(keys(Loader(bad_folder, batch_size=20, max_bad_share=0.02))) == 148


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_are_an_error_that_names_one(bad_folder, training, workers):
    loader = Loader(bad_folder, batch_size=10, training=training, num_workers=workers)
    with pytest.raises(
        ZooError, match=r"^2 of \d+ samples cannot be used, more than max_bad_share=0.01 .*0(07|70).png: 'png' is"
    ):
        list(loader)


def test_a_field_that_no_sample_has_is_an_error_that_says_what_there_is(make_shards):
    for training in (False, True):
        loader = Loader(make_shards(120), batch_size=4, fields=["image", "captoin"], training=training, num_workers=1)
        with pytest.raises(ZooError, match=r"no 'captoin' among its members png, json \(with caption\)") as error:
            list(loader)
        assert "\n" not in str(error.value)


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (
            {"batch_size": 3, "world_size": 3, "training": True},
            "an epoch of 8 samples has no batch of 3 for each of 3 r",
        ),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size=2"),
        ({"max_bad_share": 2}, "max_bad_share must be a share"),
        ({"seed": -1}, "seed must be"),
        ({"fields": "image"}, "fields must be a list"),
        ({"crop": "centre", "training": True}, "did you mean center"),
        ({"crop": "random", "training": True}, "needs an image_size"),
        ({"crop_scale": (0, 1), "training": True}, "crop_scale must be"),
        ({"crop": float("nan")}, "crop=nan is unknown"),
        ({"flip": float("nan")}, "flip must be true or false, got nan"),
        ({"fields": ["depth"], "flip": True, "training": True}, "neither flipped nor cut otherwise"),
    ],
)
def test_wrong_arguments_are_refused(make_shards, options, message):
    with pytest.raises(ZooError, match=message):
        Loader(make_shards(8), **{"batch_size": 2} | options)


def test_sources_of_unknown_size_ask_for_what_they_need(make_shards):
    pipe = f"pipe:cat {make_shards(3)[0]}"
    with pytest.raises(ZooError, match="give samples_per_epoch"):
        Loader(pipe, batch_size=1, training=True)
    with pytest.raises(ZooError, match="one at a time"):
        Loader([shards(pipe), shards(pipe)], batch_size=1)
    with pytest.raises(ZooError, match="needs the weight"):
        Loader([shards(pipe), shards(make_shards(3))], batch_size=1, training=True, samples_per_epoch=4)
    with pytest.raises(ZooError, match="no samples in pipe:false"):
        list(Loader("pipe:false", batch_size=1, training=True, samples_per_epoch=4, max_bad_share=1, retries=0))


@pytest.mark.skipif(not list(Path(scenes.__code__.co_filename).with_name("embedded").glob("*.tar")), reason="no scenes")
def test_the_embedded_scenes_have_what_they_promise():
    fields = ["image", "depth", "caption", "objects", "questions"]
    loader = Loader(scenes("val"), batch_size=64, image_size=64, fields=fields)
    batch = next(iter(loader))
    assert batch["image"].shape == (64, 3, 64, 64)
    assert batch["depth"].shape == (64, 1, 64, 64)
    assert batch["depth"].amin((1, 2, 3)).eq(0).all()
    assert batch["depth"].amax((1, 2, 3)).eq(1).all()
    assert all(isinstance(caption, str) and caption for caption in batch["caption"])
    assert all(1 <= len(objects) <= 8 for objects in batch["objects"])
