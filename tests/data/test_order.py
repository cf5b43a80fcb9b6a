import numpy as np
import pytest

from zoo.data import order
from zoo.data.order import Mix, Order, quotas


def test_a_pass_is_a_permutation_that_keeps_to_its_windows():
    place = Order(np.array([5, 0, 7, 1]), (0,), window=4)
    for turn in range(3):
        places = [place(turn, p) for p in range(13)]
        assert sorted(places) == [(u, i) for u, n in enumerate([5, 0, 7, 1]) for i in range(n)]
    assert [place(0, p) for p in range(13)] != [place(1, p) for p in range(13)]


def test_shards_are_put_in_order_before_samples():
    places = [Order(np.full(50, 4), (0,), window=1)(0, p) for p in range(200)]
    assert [places[i : i + 4] for i in range(0, 200, 4)] == [
        [(unit, i) for i in range(4)] for unit in [place[0] for place in places[::4]]
    ]
    assert [place[0] for place in places[::4]] != list(range(50))


@pytest.mark.parametrize("total", [800, 2100])
def test_a_mix_counts_off_each_source_without_gaps(total, monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 1000)
    parts = quotas([5, 1, 2], total)
    mix = Mix(parts, (0,))
    sources, ordinals = np.array([mix(1, p) for p in range(total)]).T
    for s, part in enumerate(parts):
        np.testing.assert_array_equal(ordinals[sources == s], np.arange(part))
    assert abs((sources[: total // 4] == 0).mean() - 5 / 8) < 0.1


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([1, 1, 1], 10, [4, 3, 3]), ([0.1, 0.2, 0.7], 10, [1, 2, 7]), ([3, 5], 8, [3, 5]), ([1, 999], 10, [0, 10])],
)
def test_quotas_are_whole_and_sum_up(weights, total, expected):
    assert quotas(weights, total).tolist() == expected
