import json
import os
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from alignprop.checkpoint import checkpoints_of
from alignprop.evaluate import Evaluator
from alignprop.lora import LORA_FILE, trainable_parameters
from alignprop.models.sd import StableDiffusion
from alignprop.prompts import draw_prompts
from alignprop.seeding import generator, generators
from alignprop.settings import ConfigError
from alignprop.stopping import STOPPED
from alignprop.trainer import AlignPropTrainer
from rewards import RewardError
from tests.toy_rewards import redness


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one precision for a whole process."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Drawing curves costs more than these runs; the test of the run folder keeps it."""
    if "complete" not in request.node.name:
        monkeypatch.setattr("alignprop.records.plot_curves", lambda rows, path: None)


def train(config):
    trainer = AlignPropTrainer(config)
    trainer.train()
    return trainer


def rows(trainer, kind=None):
    found = [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found if kind in (None, r["kind"])]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.weights.parameters])



def test_a_run_folder_is_complete(toy_config):
    trainer = train(toy_config(run_name="r", eval_freq=1))
    folder = trainer.run.folder
    for name in ("config.json", "metrics.jsonl", "curves.png", "before_after.png", "samples/step_000000.png",
                 "samples/step_000004.png", f"checkpoints/checkpoint_4/{LORA_FILE}"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert [r["step"] for r in rows(trainer, "train")] == [1, 2, 3, 4]
    assert [r["step"] for r in rows(trainer, "eval")] == [0, 2, 4]
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["gradient_accumulation_steps"] == 2 and "torch" in config["versions"]


def test_training_raises_the_reward(toy_config):
    config = toy_config(num_epochs=8, train__learning_rate=2e-2, num_eval_images=8, estimator="full")
    held_out = [r["reward"] for r in rows(train(config), "eval")]
    assert held_out[-1] > held_out[0] + 0.02


@pytest.mark.parametrize("overrides", [{}, {"train__ema_decay": 0.5, "eta": 1.0}, {"use_lora": False}])
def test_stopping_and_resuming_changes_nothing(toy_config, overrides):
    overrides = {"eval_freq": 2, "save_freq": 2, **overrides}
    whole = train(toy_config(run_name="whole", num_epochs=4, **overrides))
    half = train(toy_config(run_name="parts", num_epochs=2, **overrides))
    torch.rand(7)  # a new process would not have this one's random state either
    parts = train(toy_config(num_epochs=4, resume_from=str(half.run.folder), **overrides))
    assert parts.run.folder == half.run.folder.resolve()
    assert torch.equal(weights(parts), weights(whole))
    assert rows(parts) == rows(whole)
    files = [next(checkpoints_of(t.run.folder)[-1].rglob("*.safetensors")).read_bytes() for t in (whole, parts)]
    assert files[0] == files[1]


def asks_to_stop(call, number=signal.SIGTERM):
    """A reward during whose n-th call, evaluation included, somebody asks the process to stop."""
    calls = iter(range(10**6))

    def reward(images, prompts, metadata):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return redness(images, prompts, metadata)

    reward.__name__ = "redness"
    return reward


def shaken(images, prompts, metadata):
    """A user's reward that draws from the global generators."""
    return redness(images, prompts, metadata) * (1 + torch.rand(len(images)) + np.random.rand())


def test_a_reward_that_draws_global_random_numbers_resumes_too(toy_config):
    options = dict(eval_reward_fn="", train__total_samples_per_epoch=12, num_epochs=1)
    whole = AlignPropTrainer(toy_config(run_name="whole", **options), reward=shaken)
    whole.train()
    parts = AlignPropTrainer(toy_config(run_name="parts", **options), reward=shaken)
    parts.run.open_folder(0)
    parts.evaluate()
    parts.run.log(parts.step())
    parts.save()
    parts.run.records.close()
    np.random.seed(1)
    parts = AlignPropTrainer(toy_config(run_name="parts", resume_from="latest", **options), reward=shaken)
    parts.train()
    assert rows(parts) == rows(whole)


# Call 0 is the trial, an evaluation is 2 calls and a step is 2. There are 6 steps, evaluations at 0, 3 and 6,
# checkpoints at 3 and 6.
@pytest.mark.parametrize(("call", "saved"), [
    (1, 0), (4, 1), (6, 2), (8, 3), (9, 3), (12, 4), (16, 6), (17, 6),
])  # fmt: skip
def test_asked_to_stop_anywhere_a_run_saves_and_goes_on_as_if_nothing_had_been(toy_config, call, saved):
    options = dict(eval_reward_fn="", num_epochs=2, eval_freq=1, train__total_samples_per_epoch=12, eta=1.0)
    whole = AlignPropTrainer(toy_config(run_name="whole", **options), reward=redness)
    whole.train()
    number = signal.SIGINT if call % 2 else signal.SIGTERM
    with pytest.raises(SystemExit) as stopped:
        AlignPropTrainer(toy_config(run_name="parts", **options), reward=asks_to_stop(call, number)).train()
    assert stopped.value.code == STOPPED == 75
    parts = AlignPropTrainer(toy_config(run_name="parts", resume_from="latest", **options), reward=redness)
    assert parts.global_step == saved
    parts.train()
    assert rows(parts) == rows(whole) and [r["step"] for r in rows(parts, "eval")] == [0, 3, 6]
    newest = [checkpoints_of(t.run.folder)[-1] for t in (whole, parts)]
    assert newest[0].name == newest[1].name == "checkpoint_6"
    assert (newest[0] / LORA_FILE).read_bytes() == (newest[1] / LORA_FILE).read_bytes()
    pictures = [sorted((p.name, p.read_bytes()) for p in t.run.folder.rglob("*.png")) for t in (whole, parts)]
    assert pictures[0] == pictures[1]


def test_the_same_command_starts_and_continues(toy_config):
    config = toy_config(run_name="r", resume_from="latest", num_epochs=1)
    assert train(config).global_step == 2
    again = AlignPropTrainer(config)
    assert again.global_step == 2 and again.run.checkpoint.name == "checkpoint_2"
    expected = rows(again)
    again.train()
    assert rows(again) == expected


def test_the_best_checkpoint_is_the_one_with_the_highest_held_out_reward(toy_config, monkeypatch):
    scores = iter([0.0, 0.1, 0.5, 0.3])  # evaluations at the steps 0, 2, 4, 6
    evaluate = Evaluator.__call__

    def with_score(self, **options):
        evaluation = evaluate(self, **options)
        evaluation.rewards[:] = next(scores)
        return evaluation

    monkeypatch.setattr(Evaluator, "__call__", with_score)
    trainer = train(toy_config(num_epochs=3, eval_freq=1, num_checkpoint_limit=1))
    names = [path.name for path in checkpoints_of(trainer.run.folder)]
    assert names == ["checkpoint_4", "checkpoint_6"]
    assert (trainer.run.folder / "checkpoints" / "best").resolve().name == "checkpoint_4"


def test_another_base_model_is_refused_at_resume(toy_config, pipeline_folder):
    first = train(toy_config(run_name="r", num_epochs=1))
    other = StableDiffusion.load(str(pipeline_folder))
    for parameter in other.denoiser.parameters():
        parameter.mul_(1.1)
    with pytest.raises(ConfigError, match=r"was trained on pretrained\.model"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder)), model=other)


def test_another_optimizer_is_refused_at_resume(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match=r"train.optimizer = 'adamw', this run has 'sgd'"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder), train__optimizer="sgd"))


def test_what_is_resumed_with_other_settings_is_said(toy_config, capsys):
    first = train(toy_config(run_name="r", num_epochs=1))
    AlignPropTrainer(toy_config(resume_from=str(first.run.folder), train__learning_rate=5e-4))
    told = capsys.readouterr().out
    assert "  with another train.learning_rate: 0.004 → 0.0005\n" in told
    assert told.count("with another") == 2  # num_epochs


def test_a_moving_average_may_begin_at_resume(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    again = AlignPropTrainer(toy_config(resume_from=str(first.run.folder), train__ema_decay=0.5))
    assert torch.equal(again.weights.ema.shadow_params[1], again.weights.parameters[1])
    with_average = train(toy_config(run_name="s", num_epochs=1, train__ema_decay=0.5))
    again = AlignPropTrainer(toy_config(resume_from=str(with_average.run.folder), train__ema_decay=0.25))
    assert again.weights.ema.decay == 0.25
    assert torch.equal(again.weights.ema.shadow_params[1], with_average.weights.ema.shadow_params[1])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_every_optimizer_trains_and_resumes(toy_config, optimizer):
    options = dict(train__optimizer=optimizer, train__learning_rate=1e-2)
    whole = train(toy_config(run_name="whole", num_epochs=2, **options))
    half = train(toy_config(run_name="half", num_epochs=1, **options))
    assert not torch.equal(weights(half), weights(whole))
    assert torch.equal(weights(train(toy_config(resume_from=str(half.run.folder), **options))), weights(whole))


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(toy_config, monkeypatch):
    save = torch.save

    def full(state, path):
        if state.get("global_step", 0) > 2 if isinstance(state, dict) else False:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"checkpoint of step 4 could not be written.*No space left on device"):
        train(toy_config(run_name="r"))
    monkeypatch.undo()
    again = AlignPropTrainer(toy_config(run_name="r", resume_from="latest"))
    assert again.global_step == 2


def test_resuming_an_earlier_checkpoint_drops_the_later_rows(toy_config):
    trainer = train(toy_config(run_name="r", num_epochs=2, eval_freq=1))
    expected = rows(trainer)
    earlier = str(trainer.run.folder / "checkpoints" / "checkpoint_2")
    again = train(toy_config(num_epochs=2, eval_freq=1, resume_from=earlier))
    assert rows(again) == expected


def test_the_step_is_the_gradient_of_the_mean_loss(toy_config):
    """The whole step, micro-batches and all: gradient norm, loss and adjoint against plain autograd on its plan."""
    trainer = AlignPropTrainer(toy_config(per_gpu_capacity=2, train__loss_coeff=0.5, grad_scale=3.0))
    run = trainer.run
    for parameter in trainer.weights.parameters:
        parameter.data.normal_(0, 0.3, generator=generator("w", parameter.numel()))
    plan = trainer.estimator(3, 4, generator(0, 0, "plan"))
    prompts, metadata = draw_prompts(trainer.prompts, 0, 0, range(4))
    latents = run.model.init_latents(generators(range(4), 0, 0, "noise"))
    sampler, cond = run.rollout.sampler, run.model.encode_prompts(prompts)
    for i, t in enumerate(sampler.timesteps):
        output = run.model.predict(latents, t, cond, 3.0)
        output = torch.where(plan.active[i].view(-1, 1, 1, 1), output, output.detach())
        latents = float(sampler.a[i]) * latents + float(sampler.b[i]) * output
    rewards = run.reward(run.model.decode(latents), prompts, metadata)
    grads = torch.autograd.grad(-1.5 * rewards.mean(), trainer.weights.parameters)
    expected = torch.cat([g.flatten() for g in grads]).norm().item()
    row = trainer.step()
    assert row["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert row["loss"] == pytest.approx(-1.5 * rewards.mean().item(), rel=1e-4)
    assert row["reward"] == pytest.approx(rewards.mean().item(), rel=1e-4)
    last = latents.detach().requires_grad_()
    losses = -1.5 * run.reward(run.model.decode(last), prompts, metadata)
    (adjoint,) = torch.autograd.grad(losses.sum(), [last])
    assert row["adjoint_norm"][-1] == pytest.approx(adjoint.flatten(1).norm(dim=1).mean().item(), rel=1e-3)


def test_a_checkpoint_reproduces_the_evaluation_in_a_plain_pipeline(toy_config, pipeline_folder):
    from diffusers import StableDiffusionPipeline

    trainer = train(toy_config(train__learning_rate=1e-2))
    evaluation = trainer.run.evaluator()
    plain = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)

    def sample():
        latents = trainer.run.model.init_latents(generators(range(2), 0, "evaluation"))
        prompts = evaluation.prompts[:2]
        return plain(prompts, latents=latents, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images

    base = sample()
    plain.load_lora_weights(checkpoints_of(trainer.run.folder)[-1])
    assert (sample() - evaluation.images).abs().max() < 1e-4
    assert (base - evaluation.images).abs().max() > 1e-2


def test_moving_average_is_what_is_saved_and_evaluated(toy_config):
    trainer = train(toy_config(train__ema_decay=0.9, train__learning_rate=1e-2))
    saved = load_file(checkpoints_of(trainer.run.folder)[-1] / LORA_FILE)
    raw = trainable_parameters(trainer.run.model.denoiser)
    name, parameter = next(iter(raw.items()))
    stored = saved["unet." + name.replace(".default", "")]
    assert torch.equal(stored, trainer.weights.ema.shadow_params[0]) and not torch.equal(stored, parameter)
    before = weights(trainer)
    trainer.evaluate()
    assert torch.equal(weights(trainer), before)


def test_held_out_evaluation_during_training_changes_no_step(toy_config):
    often, never = (train(toy_config(run_name=f"e{freq}", eval_freq=freq)) for freq in (1, 0))
    assert rows(often, "train") == rows(never, "train")


def test_a_non_finite_step_is_skipped_counted_and_ends_the_run_after_n(toy_config, monkeypatch):
    config = toy_config(reward_fn="tests.toy_rewards:Explodes", eval_reward_fn="", train__max_skipped_steps=3)
    with pytest.raises(ConfigError, match="3 optimizer steps in a row had a non-finite"):
        train(config)
    trainer = AlignPropTrainer(toy_config(run_name="other", reward_fn="tests.toy_rewards:Explodes", eval_reward_fn=""))
    trainer.run.reward.terms["tests.toy_rewards:Explodes"].function.calls = -1  # finite in the first step only
    trainer.step()
    before = weights(trainer)
    row = trainer.step()
    assert row["skipped_steps"] == 1 and torch.equal(weights(trainer), before)


@pytest.mark.parametrize(("reward", "message"), [
    ("wrong_shape", r"shape \[2, 1\], expected \[2\]"), ("not_a_number", "non-finite"), ("detached", "no gradient"),
])  # fmt: skip
def test_a_broken_reward_is_refused_before_anything_is_written(toy_config, tmp_path, reward, message):
    with pytest.raises(RewardError, match=f"{reward}.*{message}"):
        AlignPropTrainer(toy_config(reward_fn=f"tests.toy_rewards:{reward}", eval_reward_fn=""))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("reward", ["wrong_shape", "not_a_number"])
def test_a_broken_reward_of_the_evaluation_is_refused_too(toy_config, reward):
    with pytest.raises(RewardError, match=reward):
        AlignPropTrainer(toy_config(eval_reward_fn=f"tests.toy_rewards:{reward}"))


def test_a_reward_without_gradient_is_refused_before_the_first_batch(toy_config):
    with pytest.raises(RewardError, match="differentiable"):
        AlignPropTrainer(toy_config(reward_fn="tests.toy_rewards:hidden_rating"))


def test_a_folder_that_holds_a_run_is_not_overwritten(toy_config):
    train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match=r"run_name = 'r'.*already holds a run"):
        AlignPropTrainer(toy_config(run_name="r"))


def test_a_folder_in_which_another_process_trains_is_left_alone(toy_config):
    first = AlignPropTrainer(toy_config(run_name="r"))
    first.run.open_folder(0)
    first.evaluate()
    before = rows(first)
    with pytest.raises(ConfigError, match=r"run_name = 'r': another process is training in "):
        train(toy_config(run_name="r"))
    assert rows(first) == before


def test_another_rank_is_refused_at_resume(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match="lora_rank = 4, this run has 8"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder), lora_rank=8))


def test_no_estimator_without_gradient_trains(toy_config):
    with pytest.raises(ConfigError, match="estimator = 'none' is not one of"):
        AlignPropTrainer(toy_config(estimator="none"))


def test_evaluator_is_built_on_the_unwrapped_rollout(toy_config):
    trainer = AlignPropTrainer(toy_config())
    assert isinstance(trainer.run.evaluator, Evaluator) and trainer.run.evaluator.rollout is trainer.run.rollout


def half_precision(monkeypatch, dtype, scale):
    """accelerate refuses float16 on a CPU, where torch itself can run it: the same parts, put together by hand."""
    from accelerate import Accelerator

    def build(**options):
        accelerator = Accelerator(**options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16" if scale else "bf16"
        accelerator.autocast = lambda: torch.autocast("cpu", dtype)
        return accelerator

    monkeypatch.setattr("alignprop.run.Accelerator", build)


def test_loss_scaling_leaves_the_step_as_it_is(toy_config, monkeypatch):
    expected = AlignPropTrainer(toy_config(run_name="a")).step()
    half_precision(monkeypatch, torch.float16, scale=2.0**12)
    row = AlignPropTrainer(toy_config(run_name="b")).step()
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
    norms = [[n for n in r["adjoint_norm"] if n is not None] for r in (row, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert row["reward"] == pytest.approx(expected["reward"], abs=0.01)


def test_an_overflow_lowers_the_loss_scale_and_skips_the_step(toy_config, monkeypatch):
    half_precision(monkeypatch, torch.float16, scale=2.0**100)
    trainer = AlignPropTrainer(toy_config())
    before = weights(trainer)
    assert trainer.step()["skipped_steps"] == 1
    assert torch.equal(weights(trainer), before)
    assert trainer.run.accelerator.scaler.get_scale() < 2.0**100


def test_bfloat16_trains_a_float32_adapter(toy_config):
    trainer = AlignPropTrainer(toy_config(mixed_precision="bf16"))
    assert trainer.run.model.denoiser.conv_in.weight.dtype == torch.bfloat16
    before = weights(trainer)
    assert trainer.step()["grad_norm"] > 0
    assert before.dtype == torch.float32 and not torch.equal(weights(trainer), before)


def test_trackers_get_the_run(toy_config):
    trainer = train(toy_config(log_with="tensorboard", num_epochs=1))
    assert list(trainer.run.folder.rglob("events.out.tfevents*"))


def test_overrides_count_when_resuming(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    again = AlignPropTrainer(toy_config(resume_from=str(first.run.folder), train__learning_rate=5e-4))
    assert [group["lr"] for group in again.weights.optimizer.param_groups] == [5e-4]
    assert again.weights.optimizer.state_dict()["state"][0]["step"] == 2


def test_resuming_with_another_evaluation_goes_on(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    picture = first.run.folder / "before_after.png"
    drawn = picture.read_bytes()
    again = train(toy_config(resume_from=str(first.run.folder), num_eval_images=1, max_vis_images=1, eval_reward_fn=""))
    assert rows(again, "eval")[-1]["step"] == 4
    assert picture.read_bytes() == drawn  # one picture is not set beside two


def test_a_finished_run_says_where_it_is(toy_config, capsys):
    first = train(toy_config(run_name="r", num_epochs=1))
    train(toy_config(resume_from=str(first.run.folder), run_name="copy", num_epochs=1))
    assert "copy: checkpoints, config.json, metrics.jsonl" in capsys.readouterr().out


def test_a_copied_checkpoint_of_any_name_resumes(toy_config, tmp_path):
    first = train(toy_config(run_name="r", num_epochs=1))
    best = checkpoints_of(first.run.folder)[-1].rename(tmp_path / "best")
    assert AlignPropTrainer(toy_config(resume_from=str(best), run_name="s")).global_step == 2


def test_an_abandoned_future_is_set_aside(toy_config):
    first = train(toy_config(run_name="r", num_epochs=3, num_checkpoint_limit=0))
    assert [p.name for p in checkpoints_of(first.run.folder)] == ["checkpoint_2", "checkpoint_4", "checkpoint_6"]
    start = str(checkpoints_of(first.run.folder)[0])
    train(toy_config(resume_from=start, num_epochs=2, num_checkpoint_limit=1))
    names = sorted(p.name for p in (first.run.folder / "checkpoints").iterdir())
    assert names == ["abandoned_4", "abandoned_6", "best", "checkpoint_2", "checkpoint_4"]


def test_a_lora_checkpoint_does_not_resume_full_fine_tuning(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match=r"use_lora or pretrained.model differ"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder), use_lora=False))


def test_a_run_without_checkpoint_starts_over_under_its_name(toy_config):
    config = toy_config(run_name="r", num_epochs=1)
    broken = AlignPropTrainer(config)
    broken.run.open_folder(0)
    broken.evaluate()
    broken.run.records.close()
    assert [r["step"] for r in rows(train(config))] == [0, 1, 2, 2]


def test_any_callable_is_a_reward_for_the_library(toy_config):
    trainer = AlignPropTrainer(toy_config(), reward=lambda images, prompts, metadata: images.mean(dim=(1, 2, 3)))
    assert trainer.step()["grad_norm"] > 0


def test_non_finite_losses_under_loss_scaling_are_skipped_too(toy_config, monkeypatch):
    half_precision(monkeypatch, torch.float16, scale=2.0**12)
    trainer = AlignPropTrainer(toy_config(reward_fn="tests.toy_rewards:Explodes", eval_reward_fn=""))
    trainer.run.reward.terms["tests.toy_rewards:Explodes"].function.calls = -1  # finite in the first step only
    assert [trainer.step()["skipped_steps"] for _ in range(3)] == [0, 1, 2]


def test_full_fine_tuning_in_half_precision_starts_from_the_exact_weights(toy_config, pipeline_folder):
    trainer = AlignPropTrainer(toy_config(mixed_precision="bf16", use_lora=False))
    stored = load_file(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors")
    trained = trainable_parameters(trainer.run.model.denoiser)
    assert trained.keys() == stored.keys() and all(torch.equal(p, stored[name]) for name, p in trained.items())
    assert trainer.run.model.vae.dtype == torch.bfloat16
    before = weights(trainer)
    assert trainer.step()["grad_norm"] > 0 and not torch.equal(weights(trainer), before)
