"""Reward guidance as a task: what it compares, with which memory policies, and its mistakes."""

import json

import pytest

from alignprop.build import build_run
from alignprop.memory.checkpointing import apply_policy
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.warnings import warnings_for
from alignprop.tasks import guide
from rewards import RewardError
from tests.helpers import warm
from tests.runs.test_evaluate import save_random_lora


def means(folder):
    found = json.loads((folder / "guide.json").read_text())
    return {variant: row["tests.helpers.toy_rewards:redness"]["mean"] for variant, row in found.items()}, found


def test_the_task_compares_every_variant(toy_config, pipeline_folder, tmp_path, capsys):
    lora = save_random_lora(pipeline_folder, tmp_path / "lora", 1)
    folder = guide(toy_config("tiny_guide", resume_from=lora, guide__strength=0.5))
    variants = ["plain", "guided", "fine-tuned plain", "fine-tuned guided"]
    mean, found = means(folder)
    assert list(found) == variants
    assert mean["guided"] > mean["plain"] + 0.01 and mean["fine-tuned guided"] > mean["fine-tuned plain"] + 0.01
    assert abs(mean["fine-tuned plain"] - mean["plain"]) > 1e-4
    for row in found.values():
        assert row["seconds_per_picture"] > 0 and row["tests.helpers.toy_rewards:contrast"]["stderr"] > 0
    assert "base_distance" in found["fine-tuned guided"] and "base_distance" not in found["guided"]
    for name in ("plain", "guided", "fine-tuned_plain", "fine-tuned_guided"):
        assert len(list((folder / name / "images").iterdir())) == 4 and (folder / name / "scores.csv").exists()
    assert (folder / "comparison.png").exists() and (folder / "guide.png").exists()
    told = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if "redness" in line]
    assert told == variants


@pytest.mark.parametrize("policy", ["lean", "smallest"])
def test_memory_policies_are_applied_and_change_rounding_alone(toy_config, policy, monkeypatch):
    applied = []

    def apply(model, memory):
        applied.append(memory)
        apply_policy(model, memory)

    monkeypatch.setattr("alignprop.tasks.apply_policy", apply)
    options = dict(guide__strength=0.3, num_eval_images=2)
    found = [means(guide(toy_config("tiny_guide", memory_policy=p, **options)))[0] for p in ("fast", policy)]
    assert applied == [POLICIES["fast"], POLICIES[policy]] and found[0] == pytest.approx(found[1], abs=1e-5)


def test_the_plain_pictures_are_those_of_an_evaluation(toy_config):
    expected = build_run(toy_config("tiny_evaluate")).evaluator().rewards.mean().item()
    assert means(guide(toy_config("tiny_guide")))[0]["plain"] == pytest.approx(expected)


def test_mistakes_are_one_line(toy_config):
    with pytest.raises(RewardError, match="says differentiable=False"):
        guide(toy_config("tiny_guide", reward_fn="tests.helpers.toy_rewards:hidden_rating"))
    with pytest.raises(RewardError, match="do not depend on the images"):
        guide(toy_config("tiny_guide", reward_fn="tests.helpers.toy_rewards:detached"))
    with pytest.raises(ConfigError, match=r"guide.window = \(0.4, 0.45\) has none of the 2"):
        guide(toy_config("tiny_guide", guide__window=(0.4, 0.45)))
    done = warm.call("main.py", "--config=config/align_prop.py:tiny_guide", "--config.guide.through=vae")
    assert done.returncode == 1 and "guide.through = 'vae'" in done.stderr and "Traceback" not in done.stderr


def test_fields_of_the_gradient_have_an_effect_here(toy_config):
    fields = ["guidance_grad", "memory.decoder_checkpointing", "estimator"]
    guides, evaluates = (warnings_for(toy_config(task=task), fields) for task in ("guide", "evaluate"))
    assert [line.split()[0] for line in guides] == ["estimator"]
    assert [line.split()[0] for line in evaluates] == fields
