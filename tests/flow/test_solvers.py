"""Samplers on Gaussian data, whose velocity field and solution are known."""

import itertools
import math

import pytest
import torch

from zoo.flow import (
    adaptive,
    data_at,
    euler,
    euler_maruyama,
    guide,
    guide_twice,
    heun,
    interpolate,
    linear_scale,
    renormalize,
    score,
    velocity,
)
from zoo.flow.times import falling, logit_normal, shift

MEAN, STD = 1.5, 0.5


def field(x, t):
    """E[e - x0 | x_t = x] for x0 ~ N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def times(steps):
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_deterministic_samplers_converge_with_their_order(solver, order):
    start = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    errors = [(solver(field, start, times(n)) - (MEAN + STD * start)).abs().max().item() for n in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_an_adaptive_solver_is_as_exact_as_asked():
    start = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    end = adaptive(field, start, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(end, MEAN + STD * start, rtol=1e-6, atol=1e-6)


def moments(steps):
    """Mean and variance of what the stochastic sampler returns, exactly: it is linear in the start and the noises."""
    unit = torch.eye(steps, dtype=torch.float64)  # row j: the only number that is not 0 is the start, or noise j
    rows = torch.cat([torch.zeros(1, steps, dtype=torch.float64), unit])  # and a row where all are 0
    grid = torch.linspace(1, 0.02, steps, dtype=torch.float64).tolist() + [0.0]
    end = euler_maruyama(field, rows[:, 0], grid, noises=[rows[:, j] for j in range(1, steps)])
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


def test_the_stochastic_sampler_converges_in_distribution_with_order_1():
    limit = moments(1600)  # the last step, from t = 0.02, has an error of its own that more steps do not change
    assert limit == (pytest.approx(MEAN, abs=5e-3), pytest.approx(STD**2, abs=5e-3))
    coarse, fine = (moments(n) for n in (50, 100))
    assert coarse[0] == pytest.approx(MEAN)  # the mean has no error at all
    assert math.log2((coarse[1] - limit[1]) / (fine[1] - limit[1])) == pytest.approx(1, abs=0.15)


def test_the_last_step_has_no_noise_and_draws_are_reproducible():
    x = torch.zeros(2, dtype=torch.float64)
    draws = iter([torch.ones(2, dtype=torch.float64)])
    out = euler_maruyama(field, x, [1.0, 0.5, 0.0], noises=draws)
    first = x - 0.5 * (field(x, 1.0) - score(x, field(x, 1.0), 1.0)) + 1.0
    v = field(first, 0.5)
    torch.testing.assert_close(out, first - 0.5 * (v - 0.5 * score(first, v, 0.5)))
    one, other = (euler_maruyama(field, x, times(4)[:-1], generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)


def test_velocity_data_and_score_belong_together():
    data, noise = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    x, v = interpolate(data, noise, t), velocity(data, noise)
    torch.testing.assert_close(data_at(x, v, t), data)
    torch.testing.assert_close(score(x, v, t), -noise / t[:, None])  # of x_t given the data
    torch.testing.assert_close(interpolate(data, noise, 0.25), 0.75 * data + 0.25 * noise)


def test_the_score_of_gaussian_data_is_that_of_its_density():
    x, t = torch.tensor([0.2], dtype=torch.float64), 0.3
    variance = 0.7**2 * STD**2 + t**2
    torch.testing.assert_close(score(x, field(x, t), t), -(x - 0.7 * MEAN) / variance)


def test_guidance_moves_from_the_unconditional_through_the_conditional():
    c, u = torch.tensor([2.0]), torch.tensor([1.0])
    assert [guide(c, u, scale).item() for scale in (0, 1, 3)] == [1, 2, 4]
    assert [linear_scale(4, step, 4) for step in range(4)] == [1, 2, 3, 4]
    assert linear_scale(4, 0, 1) == 4


def test_two_guidances_are_steps_from_the_unconditional_over_the_partial_one():
    c, p, u = torch.tensor([7.0]), torch.tensor([3.0]), torch.tensor([1.0])
    assert guide_twice(c, p, u, 1, 1).item() == 7
    assert guide_twice(c, p, u, 0, 2).item() == 5
    assert guide_twice(c, p, u, 2, 1).item() == 11
    torch.testing.assert_close(guide_twice(c, u, u, 2.5, 9.0), guide(c, u, 2.5))


def test_renormalised_vectors_are_never_longer_than_the_conditional_ones():
    conditional = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    guided = torch.tensor([[0.0, 10.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    expected = torch.tensor([[0.0, 5.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(renormalize(guided, conditional), expected, rtol=1e-6, atol=1e-7)


def test_times_are_logit_normal_or_shifted():
    t = logit_normal((100_000,), generator=torch.Generator().manual_seed(0))
    assert t.median().item() == pytest.approx(0.5, abs=0.01)
    assert (t < 0.2689).float().mean().item() == pytest.approx(0.1587, abs=0.01)  # sigmoid(-1)
    assert shift(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == pytest.approx([0, 0.75, 1])
    assert torch.equal(shift(t, 1.0), t)
    assert falling(4) == [1, 0.75, 0.5, 0.25, 0]
    assert falling(2, 3.0) == pytest.approx([1, 0.75, 0])
