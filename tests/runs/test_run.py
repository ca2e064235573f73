import json

import pytest
import torch

from alignprop.build import build_run
from alignprop.memory.planner import Choice
from alignprop.models.sd import StableDiffusion
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES
from alignprop.trainer import AlignPropTrainer
from alignprop.trial import use_policy_that_fits
from rewards import RewardError
from tests.helpers.training import train, weights


@pytest.mark.parametrize(("reward", "message"), [
    ("wrong_shape", r"shape \[2, 1\], expected \[2\]"), ("not_a_number", "non-finite"), ("detached", "no gradient"),
])  # fmt: skip
def test_a_broken_reward_is_refused_before_anything_is_written(toy_config, tmp_path, reward, message):
    with pytest.raises(RewardError, match=f"{reward}.*{message}"):
        AlignPropTrainer(toy_config(reward_fn=f"tests.helpers.toy_rewards:{reward}", eval_reward_fn=""))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("reward", ["wrong_shape", "not_a_number"])
def test_a_broken_reward_of_the_evaluation_is_refused_too(toy_config, reward):
    with pytest.raises(RewardError, match=reward):
        AlignPropTrainer(toy_config(eval_reward_fn=f"tests.helpers.toy_rewards:{reward}"))


def test_a_gradient_that_is_only_the_rewards_own_is_none(toy_config):
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(RewardError, match="do not depend on the images"):
        AlignPropTrainer(toy_config(), reward_function=lambda images, *_: weight * images.detach().mean(dim=(1, 2, 3)))


def test_a_reward_without_gradient_is_refused_before_the_first_batch(toy_config):
    with pytest.raises(RewardError, match="differentiable"):
        AlignPropTrainer(toy_config(reward_fn="tests.helpers.toy_rewards:hidden_rating"))


def test_a_folder_that_holds_a_run_is_not_overwritten(toy_config):
    train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match=r"run_name = 'r'.*already holds a run"):
        AlignPropTrainer(toy_config(run_name="r"))


@pytest.mark.parametrize(("overrides", "field"), [
    ({"num_inference_steps": 2000}, "num_inference_steps"),
    ({"train__num_inference_steps": 2000}, r"train\.num_inference_steps"),
])  # fmt: skip
def test_more_sampler_steps_than_the_model_has(toy_config, overrides, field):
    with pytest.raises(ConfigError, match=f"^{field} = 2000 must not exceed the model's 1000"):
        AlignPropTrainer(toy_config(**overrides))


def test_another_base_model_is_refused_at_resume(toy_config, pipeline_folder):
    first = train(toy_config(run_name="r", num_epochs=1))
    other = StableDiffusion.load(str(pipeline_folder))
    for parameter in other.denoiser.parameters():
        parameter.mul_(1.1)
    with pytest.raises(ConfigError, match=r"was trained on pretrained\.model"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder)), model=other)


def test_a_copied_checkpoint_of_any_name_resumes(toy_config, tmp_path):
    first = train(toy_config(run_name="r", num_epochs=1))
    best = checkpoints_of(first.run.folder)[-1].rename(tmp_path / "best")
    assert AlignPropTrainer(toy_config(resume_from=str(best), run_name="s")).global_step == 2


def test_trackers_get_the_run(toy_config):
    trainer = train(toy_config(log_with="tensorboard", num_epochs=1))
    assert list(trainer.run.folder.rglob("events.out.tfevents*"))


def test_latest_of_a_run_without_checkpoint_evaluates_nothing(toy_config):
    with pytest.raises(ConfigError, match=r"resume_from = 'latest', but run_name = 'typo' has no checkpoint"):
        build_run(toy_config("tiny_evaluate", run_name="typo", resume_from="latest"))


def test_a_misspelt_extra_reward_is_told_before_anything_is_loaded(toy_config, monkeypatch):
    monkeypatch.setattr("alignprop.build.load_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(RewardError, match="'asthetic'"):
        build_run(toy_config(eval_reward_fn="asthetic"))


def test_a_folder_in_the_home_folder(toy_config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_run(toy_config(log_dir="~/runs", run_name="r")).folder == tmp_path / "runs" / "r"


def test_a_run_folder_that_cannot_be_written_to(toy_config, monkeypatch):
    first = train(toy_config(run_name="r", num_epochs=1))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"logs/r' is not a folder that can be written to"):
        build_run(toy_config("tiny_evaluate", resume_from=str(first.run.folder)))


def test_what_was_chosen_is_written_down(toy_config):
    trainer = train(toy_config(run_name="r", num_epochs=1, per_gpu_capacity="auto", memory_policy="auto"))
    saved = json.loads((trainer.run.folder / "config.json").read_text())
    assert saved["per_gpu_capacity"] == 4 and saved["memory"]["guidance_batching"] == "joint"
    assert saved["train"]["gradient_accumulation_steps"] == 1


# ---- a policy that does not fit


def no_room_until(monkeypatch, policy):
    """As on a GPU where only `policy` fits; what was tried."""
    add, tried = AlignPropTrainer.add_gradients, []

    def add_gradients(trainer, *arguments):
        tried.append(trainer.run.choice.policy)
        if trainer.run.choice.policy != policy:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More words.")
        return add(trainer, *arguments)

    monkeypatch.setattr(AlignPropTrainer, "add_gradients", add_gradients)
    return tried


def test_the_next_policy_is_taken_until_one_fits(toy_config, monkeypatch, capsys):
    plain = train(toy_config(run_name="plain", memory_policy="small", num_epochs=1))
    tried = no_room_until(monkeypatch, "small")
    trainer = AlignPropTrainer(toy_config(run_name="tried", num_epochs=1))
    use_policy_that_fits(trainer.run, trainer.weights, trainer.try_memory)
    assert tried == ["fast", "lean", "balanced", "small"]
    assert trainer.run.residency.leaving >= {"denoise", "decode"} and trainer.run.choice.memory.sweep_chunk == 1
    assert "'balanced' with 2 samples does not fit (CUDA out of memory); trying 'small'" in capsys.readouterr().out
    trainer.train()
    assert torch.equal(weights(trainer), weights(plain))


def test_a_smaller_capacity_is_tried_before_a_more_frugal_policy(toy_config, monkeypatch):
    tried = no_room_until(monkeypatch, "none")
    trainer = AlignPropTrainer(toy_config(per_gpu_capacity="auto", memory_policy="lean"))
    trainer.run.use(Choice("lean", POLICIES["lean"], 4))
    with pytest.raises(ConfigError, match=r"per_gpu_capacity = 1 does not fit"):
        use_policy_that_fits(trainer.run, trainer.weights, trainer.try_memory)
    assert len(tried) == 3


def test_lean_layers_are_not_taken_for_plain_ones(toy_config, monkeypatch):
    tried = no_room_until(monkeypatch, "lean")
    trainer = AlignPropTrainer(toy_config())
    trainer.run.use(Choice("roomy", POLICIES["roomy"], 2))
    use_policy_that_fits(trainer.run, trainer.weights, trainer.try_memory)
    assert tried == ["roomy", "lean"]


@pytest.mark.parametrize(("overrides", "policy"), [
    ({}, "streaming"), ({"memory_policy": "lean"}, "lean"), ({"use_lora": False}, "balanced"),
    ({"memory__keep_steps": 1}, "balanced"),
])  # fmt: skip
def test_where_nothing_fits_it_is_said(toy_config, monkeypatch, overrides, policy):
    no_room_until(monkeypatch, "none")
    trainer = AlignPropTrainer(toy_config(**overrides))
    with pytest.raises(ConfigError, match=f"^memory_policy = '{policy}', per_gpu_capacity = 2 does not fit: CUDA out"):
        use_policy_that_fits(trainer.run, trainer.weights, trainer.try_memory)


@pytest.mark.parametrize(("fields", "active", "copies"), [
    ({"estimator": "truncated"}, [1, 1], 0), ({"estimator": "draft_lv"}, [1, 1], 2), ({"estimator": "full"}, [3, 3], 0),
    ({"estimator": "randomized", "train__total_batch_size": 8}, [3, 3], 0),
    ({"estimator": "randomized", "train__total_batch_size": 2}, [3, 2], 0),  # the most that stratified draws give
])  # fmt: skip
def test_a_trial_has_the_gradient_of_the_run(toy_config, monkeypatch, fields, active, copies):
    """It is that of the samples with the most active steps."""
    trainer, plans = AlignPropTrainer(toy_config(num_inference_steps=3, **fields)), []
    monkeypatch.setattr(trainer, "add_gradients", lambda key, indices, plan: plans.append((len(indices), plan)))
    use_policy_that_fits(trainer.run, trainer.weights, trainer.try_memory)
    ((samples, plan),) = plans
    assert samples == 2 and plan.active.sum(dim=0).tolist() == active and plan.copies == copies


def test_a_smaller_micro_batch_than_asked_for_is_told(toy_config, capsys):
    build_run(toy_config(per_gpu_capacity=3, train__total_batch_size=4))
    told = (
        "per_gpu_capacity = 3: micro-batches have 2 samples, the largest size that divides a step of 4 samples on "
        "1 process(es)"
    )
    assert told in capsys.readouterr().out
    build_run(toy_config(run_name="other", per_gpu_capacity=2, train__total_batch_size=4))
    assert "micro-batches have" not in capsys.readouterr().out


def test_a_small_learning_rate_with_prodigy_is_told(toy_config, monkeypatch, capsys):
    monkeypatch.setattr("alignprop.build.check_package", lambda name: None)
    build_run(toy_config(train__optimizer="prodigy", train__learning_rate=0.02))
    told = "warning: train.learning_rate = 0.02 multiplies the step size that 'prodigy' finds, and is usually 1"
    assert told in capsys.readouterr().out
    build_run(toy_config(run_name="other", train__optimizer="prodigy", train__learning_rate=1.0))
    assert "prodigy" not in capsys.readouterr().out
