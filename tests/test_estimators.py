import pytest
import torch

from alignprop import estimators
from alignprop.samplers import Sampler
from alignprop.seeding import generator

N, B = 50, 64


def chain(steps):
    """A flow-matching chain with even steps."""
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    ones = torch.ones(steps, dtype=torch.float64)
    return Sampler(1000 * sigma[:-1], ones, sigma.diff(), 0 * ones, ones, -sigma[:-1], 1 - sigma, sigma)


CHAIN = chain(N)


def test_full_and_none():
    assert estimators.full(CHAIN, B).active.all()
    plan = estimators.none(CHAIN, B)
    assert not plan.active.any() and plan.first_active == N


@pytest.mark.parametrize(("first", "k"), [(49, 1), (45, 5), (0, 50)])
def test_truncated_keeps_the_last_steps(first, k):
    plan = estimators.truncated(CHAIN, B, first=first)
    assert plan.first_active == first
    assert (plan.active.sum(0) == k).all() and plan.active[first:].all()


def test_randomized_draws_one_truncation_per_trajectory():
    active = estimators.randomized(CHAIN, B, generator(0), minmax=(0, N)).active
    # Once active, a trajectory stays active to its end, and its last step always is.
    assert (active[1:] >= active[:-1]).all() and active[-1].all()


def test_randomized_is_stratified_over_the_batch():
    k = estimators.randomized(CHAIN, N, generator(1), minmax=(0, N)).active.sum(0)
    assert sorted(k.tolist()) == list(range(1, N + 1))
    assert k.tolist() != sorted(k.tolist())


def test_randomized_is_uniform_for_each_sample():
    draws = [estimators.randomized(chain(10), 4, generator(seed), minmax=(0, 10)).active.sum(0) for seed in range(3000)]
    counts = torch.stack(draws)[:, 2].bincount(minlength=11)[1:]
    # Binomial: mean 300, standard deviation 16.4.
    assert ((counts - 300).abs() < 5 * 16.4).all()


def test_randomized_respects_its_range():
    k = estimators.randomized(CHAIN, B, generator(2), minmax=(30, 40)).active.sum(0)
    assert k.min() >= N - 39 and k.max() <= N - 30


def test_per_step_probabilities_are_those_of_the_released_code():
    active = estimators.per_step(chain(10), 40_000, generator(3), minmax=(0, 10)).active.double()
    expected = (torch.arange(10) + 1) / 11
    torch.testing.assert_close(active.mean(1), expected.double(), atol=0.0125, rtol=0)  # 5 standard deviations
    # Steps are independent: the covariance of two of them vanishes.
    covariance = (active[2] * active[3]).mean() - active[2].mean() * active[3].mean()
    assert abs(covariance) < 0.006


def test_select_takes_columns_of_every_field():
    plan = estimators.per_step(CHAIN, B, generator(4), minmax=(0, N))
    part = plan.select(torch.tensor([3, 5]))
    assert torch.equal(part.active, plan.active[:, [3, 5]])
    assert part.weight.shape == part.coupling.shape == (N, 2)


def test_the_same_key_gives_the_same_plan():
    draw = lambda key: estimators.randomized(CHAIN, B, generator(*key), minmax=(0, N)).active  # noqa: E731
    assert torch.equal(draw((0, 7, "plan")), draw((0, 7, "plan")))
    assert not torch.equal(draw((0, 7, "plan")), draw((0, 8, "plan")))


def test_every_name_builds_a_plan():
    for name in estimators.ESTIMATORS:
        plan = estimators.build_estimator(name, first=N - 1, minmax=(0, N))(CHAIN, B, generator(5))
        assert plan.active.shape == (N, B), name
