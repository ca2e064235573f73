import math

import pytest
import torch
import torch.nn.functional as F

from alignprop.build import build_run
from alignprop.engine.seeding import generator
from alignprop.evaluation.judges import build_judges, diversity, measured
from alignprop.prompts import load_prompts
from alignprop.settings.resolve import resolve
from rewards import RewardError
from tests.helpers.toy_rewards import redness

E1, E2, E3 = torch.eye(3)
DIAGONAL = (E1 + E2) / math.sqrt(2)


# ---- diversity


@pytest.mark.parametrize(("embeddings", "prompts", "expected"), [
    ([E1, E1], "aa", 0.0), ([E1, E2], "aa", 1.0), ([E1, -E1], "aa", 2.0), ([E1, E2, E3], "aaa", 1.0),
    ([E1, E1, E2], "aaa", 2 / 3), ([E1, DIAGONAL], "aa", 1 - math.sqrt(0.5)),
    ([E1, E2, E1, E1], "abab", 0.5),  # a: 0, b: 1
    ([E1, -E1, E2], "aab", 2.0),  # b has no pair
    ([E1, E2, E3, E1, E1], "aaabb", 0.5),  # prompts count alike, however many pairs they have
    ([E1, E2], "ab", None), ([E1], "a", None),
])  # fmt: skip
def test_diversity_in_closed_form(embeddings, prompts, expected):
    found = diversity(torch.stack(embeddings), list(prompts))
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-6)


def test_diversity_is_the_mean_over_all_pairs():
    embeddings = F.normalize(torch.randn(7, 5, generator=generator("e")), dim=1)
    pairs = torch.triu_indices(7, 7, offset=1)
    expected = 1 - F.cosine_similarity(embeddings[pairs[0]], embeddings[pairs[1]]).mean()
    assert diversity(embeddings, ["x"] * 7) == pytest.approx(expected.item(), abs=1e-6)


# ---- which CLIP, and where


def judges_of(toy_config, **overrides):
    config = resolve(toy_config(**{"num_eval_images": 8, "eval_reward_fn": "", **overrides}), 1)
    return build_judges(config, load_prompts(config.eval_prompt_fn))


@pytest.mark.parametrize(("rewards", "term", "phase"), [
    ({"reward_fn": "clip"}, "clip", "decode"),
    ({"reward_fn": "aesthetic"}, "aesthetic", "decode"),
    ({"eval_reward_fn": "clip"}, "clip", "measure"),
    ({"reward_fn": "aesthetic", "eval_reward_fn": "clip"}, "aesthetic", "decode"),
])  # fmt: skip
def test_a_clip_that_is_there_is_not_loaded_again(toy_config, monkeypatch, rewards, term, phase):
    monkeypatch.setattr("alignprop.evaluation.judges.load_clip", lambda *args, **options: pytest.fail("loaded"))
    judges = judges_of(toy_config, **rewards)
    reward, tower = judges.phases[phase]
    assert tower is judges.tower is reward.terms[term].tower
    assert sum(tower is not None for _, tower in judges.phases.values()) == 1


@pytest.mark.parametrize("rewards", [{}, {"reward_fn": "aesthetic", "aesthetic.dtype": "bfloat16"}])
def test_otherwise_it_is_loaded_and_leaves_the_device_after_its_phase(toy_config, rewards):
    judges = judges_of(toy_config, **{name.replace(".", "__"): value for name, value in rewards.items()})
    assert judges.phases["measure"] == (None, judges.tower) and judges.phases["decode"][1] is None
    run = build_run(toy_config(num_eval_images=8, eval_reward_fn=""))
    assert run.residency.phases["measure"] == [run.judges.tower] and "measure" in run.residency.leaving


@pytest.mark.parametrize("overrides", [{"eval_diversity": False}, {"num_eval_images": 4}])
def test_what_is_not_measured_is_not_loaded(toy_config, overrides):
    assert judges_of(toy_config, **overrides).tower is None


def test_a_clip_that_cannot_be_had_is_told_by_its_field(toy_config, tmp_path):
    with pytest.raises(RewardError, match=r"^clip\.model="):
        judges_of(toy_config, clip__model=str(tmp_path))


def test_the_names_of_what_is_measured(toy_config):
    options = dict(num_eval_images=8, eval_base_distance=True)
    config = resolve(toy_config(eval_reward_fn="clip,tests.helpers.toy_rewards:redness", **options), 1)
    prompts = load_prompts(config.eval_prompt_fn)
    names = ["reward", "tests.helpers.toy_rewards:redness", "clip", "diversity", "base_distance"]
    assert measured(config, prompts) == names
    assert measured(config, prompts, redness)[1] == "redness"
