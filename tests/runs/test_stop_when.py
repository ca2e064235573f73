import pytest

from alignprop.build import build_run
from alignprop.evaluation.evaluate import Evaluator
from alignprop.evaluation.stop_when import Condition, parse_stop_when, reason_to_stop, values
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.trainer import AlignPropTrainer
from rewards import build_reward
from tests.helpers.training import rows, train

NAMES = ["reward", "clip", "rewards.tiny_judge:obedience", "diversity"]


# ---- conditions


def test_conditions_are_read_as_they_are_written():
    found = parse_stop_when(" clip<0.25, reward > 9 ,rewards.tiny_judge:obedience<0.9x,reward<-1e-2", NAMES)
    assert found == [
        Condition("clip<0.25", "clip", True, 0.25, False),
        Condition("reward > 9", "reward", False, 9.0, False),
        Condition("rewards.tiny_judge:obedience<0.9x", "rewards.tiny_judge:obedience", True, 0.9, True),
        Condition("reward<-1e-2", "reward", True, -0.01, False),
    ]
    assert parse_stop_when("", NAMES) == parse_stop_when(" ", NAMES) == []


@pytest.mark.parametrize("part", [
    "clip", "clip<", "<0.3", "clip<=0.3", "clip==0.3", "clip<x", "clip<nan", "clip<inf", "clip<0.2y", "clip<0.2xx",
    "clip<0.2<0.3", "",
])  # fmt: skip
def test_what_is_no_condition_is_told(part):
    with pytest.raises(ConfigError, match=r"^stop_when = .* must be a measure, < or >, and a finite number") as error:
        parse_stop_when(f"reward>9,{part}", NAMES)
    assert f": {part!r} must be" in str(error.value)


def test_a_measure_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(ConfigError, match=r"'clop' is not one of 'reward', 'clip'.*did you mean 'clip'"):
        parse_stop_when("clop<0.3", NAMES)


@pytest.mark.parametrize(("text", "series", "met"), [
    ("clip<0.25", [0.3, 0.26], False), ("clip<0.25", [0.3, 0.24], True), ("clip<0.25", [0.24, 0.26], False),
    ("clip<0.25", [0.24], True), ("clip>0.25", [0.24, 0.26], True), ("clip<0.9x", [0.3, 0.28], False),
    ("clip<0.9x", [0.3, 0.1, 0.28], False), ("clip<0.9x", [0.3, 0.26], True), ("clip>2x", [0.3, 0.61], True),
    ("clip<2x", [0.3], False), ("clip<0.25", [0.24, None], False), ("clip<0.9x", [None, 0.3], False),
    ("clip<0.9x", [None, 0.3, 0.2], True), ("reward>9,clip<0.25", [0.24], True),
])  # fmt: skip
def test_the_newest_evaluation_counts_against_the_first(text, series, met):
    evaluations = [{} if value is None else {"clip": value} for value in series]
    assert bool(reason_to_stop(parse_stop_when(text, NAMES), evaluations)) == met


def test_the_reason_is_in_words():
    reason = reason_to_stop(parse_stop_when("reward>9,clip<0.9x", NAMES), [{"clip": 0.3}, {"clip": 0.25, "reward": 8}])
    assert reason == "stop_when = 'clip<0.9x': clip is 0.25, at first 0.3"


def test_the_reward_of_a_row_is_that_of_now():
    redness, contrast = "tests.helpers.toy_rewards:redness", "tests.helpers.toy_rewards:contrast"
    row = {"reward": 7.0, "rewards": {redness: 0.5, contrast: 0.25, "other": None}, "diversity": 0.1}
    reward = build_reward(f"{redness}:2,{contrast}:8")
    assert values(row, reward) == {redness: 0.5, contrast: 0.25, "diversity": 0.1, "reward": 3.0}
    reward.combination = "min"
    assert values(row, reward)["reward"] == 1.0
    assert "reward" not in values({"rewards": {redness: 0.5, contrast: float("nan")}}, reward)


# ---- a run


def test_a_run_ends_saves_and_says_why_and_does_so_again(toy_config, capsys):
    # A fresh adapter has moved nowhere, and a trained one somewhere.
    options = dict(run_name="r", num_epochs=3, eval_freq=1, save_freq=3, eval_base_distance=True)
    options["stop_when"] = "base_distance>0"
    first = train(toy_config(**options))
    assert first.global_step == 2
    assert [(r["kind"], r["step"]) for r in rows(first)] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    assert [p.name for p in checkpoints_of(first.run.folder)] == ["checkpoint_2"]
    assert (first.run.folder / "checkpoints" / "best").resolve().name == "checkpoint_2"
    told = capsys.readouterr().out
    assert "ended after step 2 of 6: stop_when = 'base_distance>0': base_distance is " in told
    assert "step 0 → step 2" in told  # a finished run's summary
    expected = rows(first)
    again = train(toy_config(resume_from="latest", **options))
    assert again.global_step == 2 and rows(again) == expected
    assert "ended after step 2 of 6" in capsys.readouterr().out
    on = train(toy_config(**options | {"resume_from": "latest", "stop_when": "base_distance>1e9"}))
    assert on.global_step == 6


def test_a_run_that_is_bad_from_the_start_takes_no_step(toy_config):
    trainer = train(toy_config(stop_when="reward<1e9", eval_freq=1))
    assert trainer.global_step == 0 and [r["step"] for r in rows(trainer)] == [0]


def test_the_best_is_by_the_measure_that_is_named(toy_config, monkeypatch):
    scores = iter([0.0, 0.5, 0.9, 0.1])  # the reward at the steps 0, 2, 4, 6; the other measure is 1 minus that
    call = Evaluator.__call__

    def with_score(self, **options):
        evaluation, score = call(self, **options), next(scores)
        for name, value in (("redness", score), ("contrast", 1 - score)):
            evaluation.terms[f"tests.helpers.toy_rewards:{name}"][:] = value
        return evaluation

    monkeypatch.setattr(Evaluator, "__call__", with_score)
    trainer = train(toy_config(num_epochs=3, eval_freq=1, best_by="tests.helpers.toy_rewards:contrast"))
    assert (trainer.run.folder / "checkpoints" / "best").resolve().name == "checkpoint_6"


@pytest.mark.parametrize(("overrides", "message"), [
    ({"stop_when": "clip<0.2"}, "stop_when: measure = 'clip' is not one of 'reward', "
                                "'tests.helpers.toy_rewards:redness', 'tests.helpers.toy_rewards:contrast', "
                                "'diversity', 'base_distance'"),
    ({"best_by": "clip"}, "best_by = 'clip' is not one of 'reward', 'tests.helpers.toy_rewards:redness'"),
    ({"best_by": "diversity", "eval_diversity": False}, "best_by = 'diversity' is not measured: it needs eval_"),
    ({"best_by": "diversity", "num_eval_images": 4}, "best_by = 'diversity' is not measured"),  # of 4 prompts
    ({"stop_when": "diversity<1x", "num_eval_images": 4}, "stop_when: measure = 'diversity' is not measured: it needs "
     "eval_diversity = True and several pictures of a prompt in each size: raise num_eval_images or lower "
     "num_eval_prompts"),
    ({"best_by": "base_distance", "eval_base_distance": False}, "best_by = 'base_distance' is not measured"),
    ({"best_by": "base_distance", "use_lora": False}, "best_by = 'base_distance' is not measured"),
    ({"stop_when": "reward"}, "stop_when = 'reward': 'reward' must be"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_loaded(toy_config, monkeypatch, overrides, message):
    monkeypatch.setattr("alignprop.build.load_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(ConfigError) as error:
        AlignPropTrainer(toy_config(**{"num_eval_images": 8, "eval_base_distance": True, **overrides}))
    assert str(error.value).startswith(message)


def test_an_evaluation_alone_has_no_guards(toy_config):
    build_run(toy_config("tiny_evaluate", stop_when="clop<0.2", best_by="clop"))
