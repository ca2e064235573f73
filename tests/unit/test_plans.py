import torch

from alignprop.engine.seeding import generator
from alignprop.method.plans import GradientPlan, late_biased, stratified_integers, stratified_pairs

N = 10


def constant(value, count):
    return torch.full((count,), value)


def test_copies_are_next_to_their_sample_and_have_its_plan():
    active = torch.zeros(N, 2, dtype=torch.bool)
    active[-1, 1] = True
    plan = GradientPlan.exact(active, exit_step=torch.tensor([8, 9]), copies=2).with_copies()
    assert plan.active[-1].tolist() == [False] * 3 + [True] * 3
    assert plan.exit_step.tolist() == [8] * 3 + [9] * 3 and plan.copies == 0


def test_selection_keeps_exits_and_copies():
    plan = GradientPlan.exact(torch.ones(N, 3, dtype=torch.bool), exit_step=torch.tensor([4, 5, 6]), copies=1)
    part = plan.select(torch.tensor([2, 0]))
    assert part.exit_step.tolist() == [6, 4] and part.copies == 1 and part.leaves_early
    assert not GradientPlan.exact(plan.active).leaves_early


def test_pairs_are_uniform_over_all_pairs():
    first, second = stratified_pairs(4, 6, generator("pairs"))
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_integers_may_have_a_range_for_each_sample():
    high = torch.tensor([3, 4, 9] * 100)
    found = stratified_integers(2, high, 300, generator("integers"))
    assert (found >= 2).all() and (found < high).all()
    assert {int(i) for i in found[2::3]} == set(range(2, 9))


def test_late_bias_draws_distinct_steps_with_the_weights_it_says():
    count = 60_000
    drawn = late_biased(constant(3, count), constant(7, count), constant(1, count), N, 2.0, generator("late"))
    assert (drawn.sum(0) == 1).all()
    expected = torch.tensor([1.0, 4, 9, 16]) / 30
    # Five standard deviations of a frequency are below 0.0103.
    torch.testing.assert_close(drawn.double().mean(1)[3:7], expected.double(), atol=0.0103, rtol=0)


def test_late_bias_draws_without_replacement_one_after_the_other():
    """P(first step is missed) of weights 1, 2, 3 and two draws: 2/6·3/4 + 3/6·2/3."""
    count = 60_000
    drawn = late_biased(constant(0, count), constant(3, count), constant(2, count), N, 1.0, generator("two"))
    assert (drawn.sum(0) == 2).all() and not drawn[3:].any()
    assert abs((~drawn[0]).double().mean() - (2 / 6 * 3 / 4 + 3 / 6 * 2 / 3)) < 0.0103


def test_late_bias_takes_all_there_are_where_more_are_asked_for():
    low, high = torch.tensor([0, 5]), torch.tensor([3, 5])
    drawn = late_biased(low, high, torch.tensor([9, 2]), N, 1.0, generator("all"))
    assert drawn.sum(0).tolist() == [3, 0]


def test_what_belongs_to_a_sample_is_repeated_for_its_copies_and_averaged_over_them():
    plan = GradientPlan.exact(torch.ones(4, 2, dtype=torch.bool), exit_step=torch.tensor([3, 3]), copies=2)
    assert plan.repeat(["a", "b"]) == ["a", "a", "a", "b", "b", "b"]
    assert plan.average(torch.arange(6.0)).tolist() == [1.0, 4.0]
    assert plan.total(torch.arange(6.0)).tolist() == [3.0, 12.0]
    assert plan.average(torch.ones(6, 2, 3)).shape == plan.total(torch.ones(6, 2, 3)).shape == (2, 2, 3)
    plain = GradientPlan.exact(torch.ones(4, 2, dtype=torch.bool))
    assert plain.repeat(["a", "b"]) == ["a", "b"] and plain.average(torch.arange(2.0)).tolist() == [0.0, 1.0]


def test_a_short_plan_has_all_steps_or_with_copies_the_last_alone():
    assert GradientPlan.short(3, 2).active.all() and not GradientPlan.short(3, 2).leaves_early
    with_copies = GradientPlan.short(3, 2, copies=1)
    assert with_copies.active.sum(dim=0).tolist() == [1, 1] and with_copies.exit_step.tolist() == [2, 2]
