import math

import pytest
import torch
import torch.nn.functional as F

from zoo.metrics.probe import linear_probe, most_frequent, probe, probe_classes

DRAWN = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=DRAWN, dtype=torch.float64)


@pytest.mark.parametrize("width", [5, 60])
def test_it_is_ridge_regression_with_fewer_or_more_features_than_rows(width):
    train, test, targets = draw(40, width) * 3 + 1, draw(7, width), draw(40, 2) + 4
    x, rows = (((one - train.mean(0)) / train.std(0)) for one in (train, test))
    # a constant that is not penalised, and rows that pull the weights to zero
    penalty = 0.1 * x.square().mean() * 40
    left = torch.cat(
        [torch.cat([x, torch.ones(40, 1)], 1), torch.cat([penalty.sqrt() * torch.eye(width), torch.zeros(width, 1)], 1)]
    )
    right = torch.cat([targets, torch.zeros(width, 2)])
    weights = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(linear_probe(train, targets, test, [0.1]), rows @ weights[:-1] + weights[-1])


def test_the_penalty_is_the_one_that_does_best_on_rows_that_were_held_out():
    train, test = draw(400, 300), draw(30, 300)
    noise = draw(400, 1)
    torch.testing.assert_close(linear_probe(train, noise, test), linear_probe(train, noise, test, [10.0]))
    linear = train[:, :1] * 2
    torch.testing.assert_close(linear_probe(train, linear, test), linear_probe(train, linear, test, [1e-3]))


def test_rows_may_be_sorted_by_class():
    labels = torch.arange(100) // 20
    rows, test = F.one_hot(labels) + 0.01 * draw(100, 5), draw(9, 5)
    targets = F.one_hot(labels)
    torch.testing.assert_close(linear_probe(rows, targets, test), linear_probe(rows, targets, test, [1e-3]))


def test_classes_that_a_plane_tells_apart_are_found():
    labels = torch.arange(90) % 3
    features = torch.eye(3)[labels] @ torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    features = features + 0.01 * torch.randn(90, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(probe_classes(features[:60], labels[:60], features[60:]), labels[60:])


def test_a_feature_that_never_varies_does_no_harm():
    train, test = (
        torch.cat([draw(20, 3), torch.full((20, 1), 7.0)], 1),
        torch.cat([draw(4, 3), torch.full((4, 1), 7.0)], 1),
    )
    assert linear_probe(train, train[:, :1], test).isfinite().all()


def test_several_things_are_read_off_by_one_map_and_scored_by_their_kind():
    train, test = draw(200, 3), draw(50, 3)
    facts = {
        "side": lambda rows: (rows[:, 0] > 0).long(),
        "signs": lambda rows: torch.stack([rows[:, 1] > 0, rows[:, 0] < 9], 1),  # the second is always there
        "noise": lambda rows: torch.stack([(1e3 * rows[:, 2]).long() % 2 == 0], 1),
        "same": lambda rows: torch.ones(len(rows), 1).bool(),
    }
    learned, expected = ({name: fact(rows) for name, fact in facts.items()} for rows in (train, test))
    found = probe(train, learned, test, expected)
    assert found["side"] > 0.9
    assert found["signs"] > 0.95
    assert 0.3 < found["noise"] < 0.7
    assert math.isnan(found["same"])
    guess = linear_probe(train, torch.cat([F.one_hot(learned["side"]), *list(learned.values())[1:]], 1), test)[:, 2]
    above = guess[expected["signs"][:, 0], None] > guess[~expected["signs"][:, 0]]
    assert found["signs"] == pytest.approx(above.double().mean().item())  # the area under the curve
    most = learned["side"].double().mean().round()
    assert most_frequent(learned, expected) == {"side": (expected["side"] == most).double().mean().item()}
