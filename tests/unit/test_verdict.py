"""The verdict of a report, on scores that are made up, and the looks of pictures against their definitions."""

import math

import pytest
import torch

from alignprop.evaluation.looks import looks
from alignprop.evaluation.report.verdict import Point, change, drifts, index, judge, listed, student
from tests.helpers.shaped import normal

PROMPTS = [f"prompt {i // 2}" for i in range(16)]  # 8 prompts of two pictures
NOISE = 0.1 * normal(16, seed=3).double()


def points(reward, **judges):
    """Evaluations at steps 0, 10, … whose scores have these means and the same spread."""
    made = []
    for s in range(len(reward)):
        means = {name: values[s] for name, values in {"reward": reward, **judges}.items()}
        noise = NOISE + 0.01 * normal(16, seed=s).double()
        made.append(Point(10 * s, PROMPTS, {name: mean + noise for name, mean in means.items()}))
    return made


# ---- changes


def test_a_change_is_the_mean_over_prompts_with_the_standard_error_of_the_prompts():
    before, after = normal(6).double(), normal(6, seed=1).double()
    found = change(before, after, ["a", "a", "b", "c", "c", "c"])
    d = after - before
    means = torch.stack([d[:2].mean(), d[2], d[3:].mean()])
    assert found.mean == pytest.approx(means.mean().item())
    assert found.error == pytest.approx(means.std().item() / math.sqrt(3)) and found.count == 3


def test_only_changes_of_three_standard_errors_count():
    one = torch.zeros(16).double()
    spread = torch.tensor([1.0, -1.0] * 4).repeat_interleave(2).double()  # the error is 1/sqrt(7)
    # The two-sided .27 % of Student's t with 7 degrees of freedom is 4.53.
    for size, counts in ((4.45, False), (4.60, True)):
        after = spread + size / math.sqrt(7)
        assert change(one, after, PROMPTS).rose is counts and change(one, -after, PROMPTS).fell is counts
        assert not change(one, after, PROMPTS).fell and not change(one, -after, PROMPTS).rose


@pytest.mark.parametrize(("freedom", "expected"), [(3, 9.22), (7, 4.53), (20, 3.42), (1000, 3.01)])
def test_few_prompts_need_a_larger_change(freedom, expected):
    """The quantiles of Student's t at the probability that a normal distribution has at 3."""
    assert student(3.0, freedom) == pytest.approx(expected, rel=0.08 if freedom == 3 else 0.01)
    assert student(1.96, 10) == pytest.approx(2.228, rel=0.005)


def test_with_one_prompt_the_pictures_are_compared():
    before, after = normal(12).double(), 5 + normal(12, seed=1).double()
    found, alone = (change(before, after, prompts) for prompts in (["a"] * 12, [*"abcdefghijkl"]))
    assert found == alone and found.rose
    assert not change(torch.zeros(1), torch.ones(1), ["a"]).rose


def test_a_run_that_diverged_is_said_to_have():
    made = points([0, 1], clip=[1, 1])
    made[1].scores["clip"][3] = math.nan
    verdict = judge(made, ["clip"])
    assert (verdict.kind, verdict.best) == ("broken", None)
    assert verdict.sentence == "At step 10 clip is not finite for some pictures: the run has diverged."


def test_an_evaluation_with_nan_in_between_is_not_the_best():
    made = points([0, 1, 2], clip=[0, 1, 2])
    made[1].scores["clip"][3] = math.nan
    assert judge(made, ["clip"]).best == 20


def test_nan_counts_as_no_change():
    found = change(torch.zeros(2), torch.tensor([1.0, math.nan]), ["a", "b"])
    assert not found.rose and not found.fell


# ---- verdicts


def test_a_judge_that_falls_while_the_reward_rises_is_named_with_its_step():
    verdict = judge(points([0, 1, 2, 3, 4], clip=[0, 1, 2, 1.5, 1]), ["clip"])
    assert (verdict.kind, verdict.best, verdict.turned) == ("hacked", 20, 30)
    assert verdict.sentence == (
        "The trained reward rose, but what was not trained (clip) fell from step 30. The pictures were best at step 20."
    )
    assert any("best_by" in advice for advice in verdict.advice)


def test_one_judge_that_falls_is_not_hidden_by_another_that_rises():
    verdict = judge(points([0, 1, 2, 3], clip=[2, 2, 1, 0.5], other=[0, 2, 5, 20]), ["clip", "other"])
    assert (verdict.kind, verdict.best, verdict.turned) == ("hacked", 10, 20)
    assert "(clip) fell from step 20" in verdict.sentence


def test_of_two_judges_that_fall_the_first_decides():
    verdict = judge(points([0, 1, 2, 3], clip=[2, 2, 2, 0.5], other=[0, 2, 1, 0]), ["clip", "other"])
    assert (verdict.best, verdict.turned) == (10, 20)
    assert "(clip and other) fell from step 20" in verdict.sentence


def test_judges_count_alike_whatever_their_scales_are():
    made = points([0, 1], clip=[1, 2], other=[3, 4])
    scaled = [Point(p.step, PROMPTS, {**p.scores, "clip": 100 * p.scores["clip"]}) for p in made]
    torch.testing.assert_close(index(scaled, ["clip", "other"]), index(made, ["clip", "other"]))


def test_a_judge_that_recovers_has_not_turned():
    verdict = judge(points([0, 1, 2, 3], clip=[0, 2, 1, 2]), ["clip"])
    assert (verdict.kind, verdict.turned) == ("better", None)


def test_judges_that_rise_and_judges_that_stay():
    rises = judge(points([0, 1, 2], clip=[0, 1, 2]), ["clip"])
    assert (rises.kind, rises.best, rises.turned) == ("better", 20, None) and rises.sentence.endswith("rose with it.")
    both = judge(points([0, 1, 2], clip=[0, 1, 2], other=[1, 1, 1]), ["clip", "other"])
    assert both.sentence == (
        "The trained reward rose, and what was not trained rose with it (clip) or ended near its best (other)."
    )
    stays = judge(points([0, 1, 2], clip=[1, 1, 1]), ["clip"])
    assert stays.kind == "kept" and stays.sentence.endswith("stayed as it was.")


def test_a_judge_that_falls_from_the_first_evaluation_on():
    verdict = judge(points([0, 1, 2], clip=[2, 1, 0]), ["clip"])
    assert (verdict.kind, verdict.best, verdict.turned) == ("hacked", 0, 10)


@pytest.mark.parametrize(
    ("reward", "kind"), [([2, 1, 0], "fell"), ([1, 1, 1], "still"), ([0, 1, 2], "kept")], ids=["fell", "still", "rose"]
)
def test_what_the_reward_did(reward, kind):
    assert judge(points(reward, clip=[1, 1, 1]), ["clip"]).kind == kind


def test_a_reward_and_a_judge_that_both_fall():
    verdict = judge(points([2, 1, 0], clip=[2, 1, 0]), ["clip"])
    assert verdict.kind == "fell" and verdict.sentence.startswith("The trained reward fell, and what")


def test_without_a_judge_nothing_is_claimed():
    verdict = judge(points([0, 1, 2]), [])
    assert (verdict.kind, verdict.best) == ("unmeasured", None)
    assert "eval_reward_fn" in verdict.advice[0]


def test_a_judge_that_never_varies_is_no_judge():
    made = [Point(p.step, PROMPTS, {**p.scores, "flat": torch.ones(16).double()}) for p in points([0, 1])]
    assert judge(made, ["flat"]).kind == "unmeasured"


def test_one_evaluation_is_too_early():
    assert judge(points([1]), []).kind == "early"


# ---- remarks


def test_a_look_that_was_zero_is_no_drift():
    made = [
        Point(s, PROMPTS, {"reward": NOISE, "saturation": torch.full((16,), v).double()})
        for s, v in ((0, 0.0), (1, 0.5))
    ]
    assert drifts(*made) == []


def test_drifts_are_told_and_small_changes_are_not():
    first, last = points([0, 0], saturation=[0.4, 0.6], sharpness=[0.5, 0.52])
    (found,) = drifts(first, last)
    rise = (last.scores["saturation"] - first.scores["saturation"]).mean() / first.scores["saturation"].mean()
    assert found == f"The saturation of the pictures rose by {rise:.0%}."
    assert drifts(first, first) == []


def test_pictures_that_became_alike_are_told():
    made = [Point(s, PROMPTS, {"reward": NOISE}, {"diversity": d}) for s, d in ((0, 0.4), (1, 0.25), (2, 0.1))]
    assert drifts(*made[:2]) == []
    assert drifts(made[0], made[2]) == [
        "Pictures of the same prompt became more alike: the diversity fell from 0.4 to 0.1."
    ]


def test_names_in_a_sentence():
    assert listed(["a"]) == "a" and listed(["a", "my.rewards:b"]) == "a and b" and listed("abc") == "a, b and c"


# ---- looks


def test_grey_pictures_have_no_saturation_and_pure_colours_have_all():
    grey = torch.full((1, 3, 8, 8), 0.3)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    assert looks(torch.cat([grey, red]))["saturation"].tolist() == [0, 1]
    assert looks(torch.cat([grey, red]))["sharpness"].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_sharpness_is_the_size_of_the_laplacian_of_the_brightness():
    x = torch.arange(10.0)
    picture = (x**2)[None, :].expand(9, 10).expand(1, 3, 9, 10)  # its second derivative is 2 everywhere
    assert looks(picture)["sharpness"].item() == pytest.approx(2, rel=1e-4)
    assert looks(normal(2, 3, 9, 12))["sharpness"].shape == (2,)
