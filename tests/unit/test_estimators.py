import pytest
import torch

from alignprop.engine.seeding import generator
from alignprop.method import estimators
from alignprop.method.chain import Sampler
from alignprop.method.plans import GradientPlan
from alignprop.settings.errors import ConfigError

N, B = 50, 64


def chain(steps):
    """A flow-matching chain with even steps."""
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    ones = torch.ones(steps, dtype=torch.float64)
    return Sampler(1000 * sigma[:-1], ones, sigma.diff(), 0 * ones, ones, -sigma[:-1], 1 - sigma, sigma)


CHAIN = chain(N)


def test_full():
    assert estimators.full(CHAIN, B).active.all()


def test_a_plan_without_an_active_step_has_all_its_steps_before_gradient():
    assert GradientPlan.exact(torch.zeros(N, B, dtype=torch.bool)).steps_before_gradient == N


@pytest.mark.parametrize(("first", "k"), [(49, 1), (45, 5), (0, 50)])
def test_truncated_keeps_the_last_steps(first, k):
    plan = estimators.truncated(CHAIN, B, first=first)
    assert plan.steps_before_gradient == first
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


def test_a_misspelt_name_is_told_in_one_line():
    with pytest.raises(ConfigError, match=r"^estimator = 'trunctated' is not one of .*; did you mean 'truncated'\?$"):
        estimators.build_estimator("trunctated")


def test_draft_lv_has_the_last_step_and_leaves_there():
    plan = estimators.draft_lv(CHAIN, B, copies=3)
    assert plan.steps_before_gradient == N - 1 and plan.copies == 3 and (plan.exit_step == N - 1).all()


def test_refl_leaves_at_its_only_active_step_in_the_last_quarter():
    plan = estimators.refl(chain(40), 10, generator(6))
    assert (plan.active.sum(0) == 1).all()
    assert sorted(plan.active.int().argmax(0).tolist()) == list(range(30, 40))
    assert torch.equal(plan.active.int().argmax(0), plan.exit_step)


def test_drtune_spaces_its_steps_evenly_up_to_the_exit():
    plan = estimators.drtune(CHAIN, 500, generator(7))
    assert plan.exit_step.min() == 30 and plan.exit_step.max() == 49 and not plan.coupling.any()
    starts = set()
    for column, end in zip(plan.active.T, plan.exit_step.tolist(), strict=True):
        steps = column.nonzero().squeeze(1)
        assert len(steps) == 3 and set(steps.diff().tolist()) == {(end + 1) // 3} and steps[-1] <= end
        starts.add(int(steps[0]))
    assert len(starts) > 1


def test_drtune_of_a_short_chain_has_all_steps():
    plan = estimators.drtune(chain(4), 20, generator(8), num_active=9, exit_window=1.0)
    assert torch.equal(plan.active.sum(0), plan.exit_step + 1)


def test_sparse_rescales_to_the_weight_of_all_steps():
    plan = estimators.sparse(chain(10), B, generator(9), num_active=4, rescale=1.0)
    assert (plan.active.sum(0) == 4).all() and not plan.coupling.any()
    torch.testing.assert_close(plan.weight, torch.full((10, B), 2.5, dtype=torch.float64))  # even steps: 10 / 4
    assert (estimators.sparse(chain(10), B, generator(9), rescale=0.0).weight == 1).all()


def test_bridge_has_its_split_and_steps_on_both_sides():
    plan = estimators.bridge(chain(12), 200, generator(10), num_active=5, coupling=0.4)
    split = (plan.coupling > 0).int().argmax(0)
    assert ((plan.coupling > 0).sum(0) == 1).all() and plan.coupling.max() == 0.4
    assert plan.active.gather(0, split[None]).all() and (plan.active.sum(0) == 5).all()
    before = (plan.active & (torch.arange(12)[:, None] < split)).sum(0)
    assert (before >= 1).all() and set(split.tolist()) == set(range(1, 12))


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", ["bridge", "lagrange", "leapalign", "sparse", "drtune", "refl", "draft_lv"])
def test_short_chains(name, steps):
    plan = estimators.build_estimator(name)(chain(steps), B, generator(11))
    assert plan.active.any(0).all() or name == "lagrange"
    assert (plan.weight[plan.active] != 0).all()


@pytest.mark.parametrize("name", ["bridge", "lagrange", "leapalign"])
def test_one_step_cannot_be_split(name):
    with pytest.raises(ConfigError, match=rf"estimator = '{name}' needs train.num_inference_steps of at least 2"):
        estimators.build_estimator(name)(chain(1), B, generator(12))


def test_leaps_cover_the_chain_from_their_start():
    """With even steps a leap's weight is the number of steps that it stands for."""
    plan = estimators.leapalign(chain(10), B, generator(13), coupling=0.5)
    for active, weight, coupling in zip(plan.active.T, plan.weight.T, plan.coupling.T, strict=True):
        k, j = active.nonzero().squeeze(1).tolist()
        torch.testing.assert_close(weight[[k, j]], torch.tensor([j - k, 10 - j]).double())
        torch.testing.assert_close(coupling[j], 0.5 * weight[j])
        assert coupling[k] == 0


def test_lagrange_carries_gradient_at_two_supports_of_each_leap():
    plan = estimators.lagrange(CHAIN, B, generator(14))
    assert plan.active.sum(0).max() == 4
    one = estimators.lagrange(CHAIN, B, generator(14), num_active=1)
    assert one.active.sum(0).max() == 2 and (plan.active | ~one.active).all()


def test_options_that_are_none_are_the_methods_own():
    plan = estimators.build_estimator("draft_lv", copies=None, coupling=None, first=3)(CHAIN, B, None)
    assert plan.copies == 2
