"""Which of k marked points is nearest."""

import numpy as np
import torch

from zoo.metrics.order import MarkerOrder, markers


def depth_maps(count=8, side=64):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0))


def test_markers_keep_the_papers_distances():
    side = 336
    depth = depth_maps(1, side)[0, 0].numpy()
    for key in "abcdefgh":
        rows, columns = markers(depth, key)
        assert len(rows) == 5
        assert max(rows.max(), columns.max()) <= 300
        values = depth[rows, columns] * 255
        for i in range(5):
            for j in range(i):
                assert np.hypot(rows[i] - rows[j], columns[i] - columns[j]) >= 20
                assert abs(values[i] - values[j]) >= 20


def test_markers_scale_with_the_map():
    depth = np.linspace(0.1, 1, 48 * 96, dtype=np.float32).reshape(48, 96)
    tall = [markers(depth, str(i)) for i in range(50)]
    assert max(rows.max() for rows, _ in tall) <= 300.5 / 336 * 48
    assert 60 < max(columns.max() for _, columns in tall) <= 300.5 / 336 * 96


def test_the_same_key_marks_the_same_places():
    depth = depth_maps(1)[0, 0].numpy()
    assert np.array_equal(markers(depth, "a"), markers(depth, "a"))
    assert not np.array_equal(markers(depth, "a"), markers(depth, "b"))


def test_a_perfect_map_is_always_right_and_a_reversed_one_never():
    maps, keys = depth_maps(), [str(i) for i in range(8)]
    for decoded, accuracy in ((maps, 1), (1 - maps, 0)):
        metric = MarkerOrder()
        metric.update(decoded, maps, keys)
        values = metric.compute()
        assert [values[f"order_{k}"] for k in (2, 3, 4, 5)] == [accuracy] * 4


def test_a_constant_map_is_right_by_chance():
    maps = depth_maps(400, 32)
    metric = MarkerOrder()
    metric.update(torch.full_like(maps, 0.5), maps, [str(i) for i in range(400)])
    values = metric.compute()
    for k in (2, 3, 4, 5):
        assert abs(values[f"order_{k}"] - values[f"order_{k}_chance"]) < 0.08


def test_maps_without_room_for_k_markers_are_not_asked():
    two_levels = torch.full((1, 1, 64, 64), 0.2)
    two_levels[..., 32:] = 0.8
    metric = MarkerOrder()
    metric.update(two_levels, two_levels, ["a"])
    values = metric.compute()
    assert [values[f"order_{k}_images"] for k in (2, 3, 4, 5)] == [1, 0, 0, 0]
