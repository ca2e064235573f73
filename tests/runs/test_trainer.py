import os
import signal

import numpy as np
import pytest
import torch

from alignprop.engine.seeding import generator, generators
from alignprop.engine.stopping import STOPPED
from alignprop.lora.files import LORA_FILE
from alignprop.method.gradient import RewardGradient
from alignprop.method.guidance import GuidedDenoiser
from alignprop.models.sd import StableDiffusion
from alignprop.prompts import draw_prompts
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.trainer import AlignPropTrainer
from rewards import RewardError
from tests.helpers.toy_rewards import redness
from tests.helpers.training import asks_to_stop, rows, shaken, train, weights


def test_the_last_epoch_is_always_saved_and_evaluated(toy_config):
    trainer = train(toy_config(num_epochs=3, save_freq=2, eval_freq=2))
    assert [path.name for path in checkpoints_of(trainer.run.folder)] == ["checkpoint_4", "checkpoint_6"]
    assert [r["step"] for r in rows(trainer, "eval")] == [0, 4, 6]


def test_training_raises_the_reward(toy_config):
    config = toy_config(num_epochs=4, train__learning_rate=4e-2, num_eval_images=8, estimator="full", eval_freq=4)
    held_out = [r["reward"] for r in rows(train(config), "eval")]
    assert held_out[-1] > 1.5 * held_out[0]


@pytest.mark.parametrize("overrides", [
    {"eta": 1.0}, {"use_lora": False}, {"train_text_encoder": True, "train__ema_decay": 0.5},
])  # fmt: skip
def test_stopping_and_resuming_changes_nothing(toy_config, overrides):
    overrides = {"eval_freq": 1, "save_freq": 1, **overrides}
    whole = train(toy_config(run_name="whole", num_epochs=2, **overrides))
    half = train(toy_config(run_name="parts", num_epochs=1, **overrides))
    torch.rand(7)  # a new process would not have this one's random state either
    parts = train(toy_config(num_epochs=2, resume_from=str(half.run.folder), **overrides))
    assert parts.run.folder == half.run.folder.resolve()
    assert torch.equal(weights(parts), weights(whole))
    assert rows(parts) == rows(whole)
    files = [next(checkpoints_of(t.run.folder)[-1].rglob("*.safetensors")).read_bytes() for t in (whole, parts)]
    assert files[0] == files[1]


def test_a_reward_that_draws_global_random_numbers_resumes_too(toy_config):
    options = dict(eval_reward_fn="", train__total_samples_per_epoch=12, num_epochs=1)
    whole = AlignPropTrainer(toy_config(run_name="whole", **options), reward_function=shaken)
    whole.train()
    parts = AlignPropTrainer(toy_config(run_name="parts", **options), reward_function=shaken)
    parts.run.open_folder(0)
    parts.evaluate()
    parts.run.log(parts.step())
    parts.save()
    parts.run.records.close()
    np.random.seed(1)
    parts = AlignPropTrainer(toy_config(run_name="parts", resume_from="latest", **options), reward_function=shaken)
    parts.train()
    assert rows(parts) == rows(whole)


def test_an_error_leaves_the_folder_to_the_next_run_of_the_same_process(toy_config, monkeypatch):
    def out_of_order():
        raise RewardError("out of order")

    config = toy_config(run_name="r", num_epochs=1, resume_from="latest")
    broken = AlignPropTrainer(config)
    monkeypatch.setattr(broken, "step", out_of_order)
    with pytest.raises(RewardError, match="out of order"):
        broken.train()
    assert train(config).global_step == 2


def test_asked_to_stop_anywhere_a_run_saves_and_goes_on_as_if_nothing_had_been(toy_config):
    """In the first evaluation, in a step, in one that saves, in the last evaluation."""
    options = dict(eval_reward_fn="", num_epochs=2, eval_freq=1, train__total_samples_per_epoch=12, eta=1.0)
    options["eval_base_distance"] = True
    whole = AlignPropTrainer(toy_config(run_name="whole", **options), reward_function=redness)
    whole.train()
    # Call 0 is the trial, an evaluation is 2 calls and a step is 2. There are 6 steps, evaluations at 0, 3 and 6,
    # checkpoints at 3 and 6.
    for call, saved in ((1, 0), (6, 2), (9, 3), (16, 6)):
        number, parts_options = signal.SIGINT if call % 2 else signal.SIGTERM, {**options, "run_name": f"parts{call}"}
        with pytest.raises(SystemExit) as stopped:
            AlignPropTrainer(toy_config(**parts_options), reward_function=asks_to_stop(call, number)).train()
        assert stopped.value.code == STOPPED == 75
        parts = AlignPropTrainer(toy_config(resume_from="latest", **parts_options), reward_function=redness)
        assert parts.global_step == saved
        parts.train()
        assert_same_run(parts, whole)


def assert_same_run(parts, whole):
    """Rows, checkpoints, files and pictures."""
    kept = [[path.name for path in checkpoints_of(t.run.folder)] for t in (whole, parts)]
    assert kept[0] == kept[1] == ["checkpoint_3", "checkpoint_6"]
    assert rows(parts) == rows(whole) and [r["step"] for r in rows(parts, "eval")] == [0, 3, 6]
    newest = [checkpoints_of(t.run.folder)[-1] for t in (whole, parts)]
    assert (newest[0] / LORA_FILE).read_bytes() == (newest[1] / LORA_FILE).read_bytes()
    pictures = [sorted((p.name, p.read_bytes()) for p in t.run.folder.rglob("*.png")) for t in (whole, parts)]
    assert pictures[0] == pictures[1]


def test_a_stop_does_not_wait_for_the_end_of_an_evaluation(toy_config):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) == 2:  # the first batch of the first evaluation, after the trial
            os.kill(os.getpid(), signal.SIGTERM)
        return redness(images, prompts, metadata)

    with pytest.raises(SystemExit):
        AlignPropTrainer(toy_config(eval_reward_fn="", num_eval_images=16), reward_function=reward).train()
    assert len(calls) == 2


def test_the_same_command_starts_and_continues(toy_config):
    config = toy_config(run_name="r", resume_from="latest", num_epochs=1)
    assert train(config).global_step == 2
    again = AlignPropTrainer(config)
    assert again.global_step == 2 and again.run.checkpoint.name == "checkpoint_2"
    expected = rows(again)
    again.train()
    assert rows(again) == expected


def test_what_is_resumed_with_other_settings_is_said(toy_config, capsys):
    first = train(toy_config(run_name="r", num_epochs=1))
    AlignPropTrainer(toy_config(resume_from=str(first.run.folder), train__learning_rate=5e-4))
    told = capsys.readouterr().out
    assert "  changed: train.learning_rate: 0.004 → 0.0005\n" in told
    assert told.count("  changed: ") == 2  # num_epochs


def test_resuming_an_earlier_checkpoint_drops_the_later_rows(toy_config):
    trainer = train(toy_config(run_name="r", num_epochs=2, eval_freq=1))
    expected = rows(trainer)
    earlier = str(trainer.run.folder / "checkpoints" / "checkpoint_2")
    again = train(toy_config(num_epochs=2, eval_freq=1, resume_from=earlier))
    assert rows(again) == expected


def test_the_step_is_the_gradient_of_the_mean_loss(toy_config):
    """The whole step, micro-batches and all: gradient norm, loss and adjoint against plain autograd on its plan."""
    trainer = AlignPropTrainer(
        toy_config(per_gpu_capacity=2, num_inference_steps=3, train__loss_coeff=0.5, grad_scale=3.0)
    )
    run = trainer.run
    for parameter in trainer.weights.parameters:
        parameter.data.normal_(0, 0.3, generator=generator("w", parameter.numel()))
    plan = trainer.estimator(run.rollout.sampler, 4, generator(0, 0, "plan"))
    prompts, metadata = draw_prompts(trainer.prompts, 0, 0, range(4))
    latents = run.model.init_latents(generators(range(4), 0, 0, "noise"))
    sampler, cond = run.rollout.sampler, run.model.encode_prompts(prompts)
    for i, t in enumerate(sampler.timesteps):
        output = GuidedDenoiser(run.model, 3.0)(latents, t, cond)
        output = torch.where(plan.active[i].view(-1, 1, 1, 1), output, output.detach())
        latents = float(sampler.a[i]) * latents + float(sampler.b[i, i]) * output
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


@pytest.mark.parametrize("overrides", [
    {}, {"memory__sweep_chunk": 1}, {"memory__lean": True}, {"train_text_encoder": True},
    {"train_text_encoder": True, "memory__sweep_chunk": 1},
])  # fmt: skip
def test_the_pull_towards_the_base_is_its_gradient(toy_config, pipeline_folder, overrides):
    """The gradient that `kl_coeff` adds, against plain autograd through a model with and one without the adapter.

    Where the text encoder is trained, the base model reads the prompts by its own.
    """
    gradients = []
    for coefficient in (0.0, 50.0):
        trainer = AlignPropTrainer(
            toy_config(run_name=f"k{coefficient:g}", num_inference_steps=3, kl_coeff=coefficient, **overrides)
        )
        for parameter in trainer.weights.parameters:
            parameter.data.normal_(0, 0.3, generator=generator("w", parameter.numel()))
        plan = trainer.estimator(trainer.run.rollout.sampler, 4, generator("plan"))
        values = trainer.add_gradients((0, 5), torch.tensor([2, 3]), plan.select(torch.tensor([2, 3])))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.weights.parameters]))
    model, sampler = trainer.run.model, trainer.run.rollout.sampler
    prompts = draw_prompts(trainer.prompts, 0, 5, [2, 3])[0]
    latents = trainer.run.rollout(generators([2, 3], 0, 5, "noise"), model.encode_prompts(prompts), None)
    base, distances = StableDiffusion.load(str(pipeline_folder)), []
    embeds = [read.encode(prompts)["prompt_embeds"] for read in (model, base)]
    for b, stream in enumerate(generators([2, 3], 0, 5, "kl")):
        i = int(torch.randint(3, (), generator=stream))
        x = sampler.alpha[i] * latents[b] + sampler.sigma[i] * torch.randn(latents.shape[1:], generator=stream)
        ours, theirs = (
            of.predict(x[None].float(), sampler.timesteps[i], {"prompt_embeds": e[[b]]})
            for of, e in zip((model, base), embeds, strict=True)
        )
        distances.append((ours - theirs.detach()).square().mean())
    loss = 50.0 * torch.stack(distances).sum() / 4
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.weights.parameters)])
    added = (gradients[1] - gradients[0]).float()
    assert (added - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1e-3
    torch.testing.assert_close(values.base_distances, torch.stack(distances).detach(), rtol=1e-4, atol=0)
    rest = values.losses + values.rewards - 50 * values.base_distances  # loss = -reward + kl
    assert values.terms.keys() == {"tests.helpers.toy_rewards:redness"} and rest.abs().max() < 1e-4


@pytest.mark.parametrize("estimator", ["randomized", "draft_lv"])
def test_every_network_is_called_in_its_own_phase(toy_config, monkeypatch, estimator):
    """Those of other phases may not be on the device."""
    config = toy_config(train_text_encoder=True, kl_coeff=1.0, estimator=estimator, memory__residency="phase")
    trainer = AlignPropTrainer(config)
    model, seen = trainer.run.model, []
    for name in ("encode", "predict", "pictures"):
        monkeypatch.setattr(model, name, noting(seen, name, trainer.run, getattr(model, name)))
    monkeypatch.setattr(model, "backward_prompts", noting(seen, "backward", trainer.run, model.backward_prompts))
    trainer.step()
    trainer.run.evaluator()
    networks = {"denoise", "sweep", "compare"}
    phases = {"encode": {"encode"}, "backward": {"encode"}, "predict": networks, "pictures": {"decode"}}
    assert {name: {phase for n, phase in seen if n == name} for name in phases} == phases


def noting(seen, name, run, function):
    return lambda *args: seen.append((name, run.residency.phase)) or function(*args)


def test_a_row_has_the_base_distance_where_it_is_held_down(toy_config):
    free = AlignPropTrainer(toy_config(run_name="free"))
    held = AlignPropTrainer(toy_config(run_name="held", kl_coeff=1e4))
    first = held.step()
    assert first["base_distance"] == 0 and first["loss"] == pytest.approx(-first["reward"])
    assert first["reward"] == free.step()["reward"]
    second = held.step()
    assert second["loss"] == pytest.approx(-second["reward"] + 1e4 * second["base_distance"], rel=1e-5)
    assert second["base_distance"] > 0 and "base_distance" not in free.step()


def test_a_run_that_learns_nothing_is_told_so_once(toy_config, capsys):
    """A reward that has a gradient at the trial, and later neither a gradient nor a difference between pictures."""
    calls = iter(range(10**6))

    def fading(images, prompts, metadata):
        return redness(images, prompts, metadata) * float(next(calls) == 0)

    AlignPropTrainer(toy_config(eval_reward_fn="", num_epochs=1), reward_function=fading).train()
    told = capsys.readouterr().out
    for cause in ("its gradient is exactly 0", "all its rewards are equal"):
        assert told.count(f"warning: step 1: {cause}; nothing is learned from such a step") == told.count(cause) == 1
    train(toy_config(run_name="other", num_epochs=1))
    assert "nothing is learned" not in capsys.readouterr().out


def test_without_a_pull_nothing_is_called_for_it(toy_config, monkeypatch):
    monkeypatch.setattr("alignprop.method.gradient.base_distance", lambda *args: pytest.fail("called"))
    assert AlignPropTrainer(toy_config()).step()["grad_norm"] > 0


def test_noise_on_the_pictures_is_seen_by_the_reward_and_passes_its_gradient(toy_config):
    clean, noisy = (AlignPropTrainer(toy_config(run_name=f"n{n}", reward_noise=n)).step() for n in (0.0, 0.5))
    assert abs(noisy["reward"] - clean["reward"]) > 1e-3
    assert noisy["grad_norm"] == pytest.approx(clean["grad_norm"], rel=1e-4)  # redness is linear in the picture


def test_each_picture_of_each_step_has_noise_of_its_own(toy_config, monkeypatch):
    trainer, drawn = AlignPropTrainer(toy_config(reward_noise=0.5, estimator="draft_lv")), []
    with_noise = RewardGradient._with_noise

    def record(gradient, images, noises):
        drawn.extend(g.initial_seed() for g in noises)
        return with_noise(gradient, images, noises)

    monkeypatch.setattr(RewardGradient, "_with_noise", record)
    trainer.step()
    trainer.step()
    assert len(drawn) == len(set(drawn)) == 2 * 4 * 3  # steps, samples, each with two copies


@pytest.mark.parametrize("estimator", ["randomized", "draft_lv"])
@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_regularisers_do_not_depend_on_the_micro_batch(toy_config, estimator, train_text_encoder):
    options = dict(reward_noise=0.5, kl_coeff=10.0, estimator=estimator, train_text_encoder=train_text_encoder)
    found = []
    for size, chunk in ((1, 0), (2, 1), (4, 3)):
        memory = dict(per_gpu_capacity=size, memory__decode_chunk=chunk, memory__sweep_chunk=chunk)
        trainer = AlignPropTrainer(toy_config(run_name=f"s{size}", **options, **memory))
        for parameter in trainer.weights.parameters:
            parameter.data.normal_(0, 0.3, generator=generator("w", parameter.numel()))
        row = trainer.step()
        found.append([row[name] for name in ("reward", "reward_std", "base_distance", "loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("combination", ["mean", "min"])
def test_training_follows_the_combination(toy_config, combination):
    names = "tests.helpers.toy_rewards:redness", "tests.helpers.toy_rewards:contrast"
    options = dict(reward_fn=f"{names[0]}:2,{names[1]}:3", eval_reward_fn="", reward_combine=combination)
    trainer = AlignPropTrainer(toy_config(**options))
    row, found = trainer.step(), trainer.run.evaluator()
    if combination == "mean":
        assert row["reward"] == pytest.approx((2 * row["rewards"][names[0]] + 3 * row["rewards"][names[1]]) / 2)
        torch.testing.assert_close(found.rewards, found.terms[names[0]] + 1.5 * found.terms[names[1]])
    else:
        torch.testing.assert_close(found.rewards, torch.minimum(2 * found.terms[names[0]], 3 * found.terms[names[1]]))
        assert row["reward"] < min(2 * row["rewards"][names[0]], 3 * row["rewards"][names[1]]) + 1e-6
    assert row["loss"] == pytest.approx(-row["reward"])


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_a_checkpoint_reproduces_the_evaluation_in_a_plain_pipeline(toy_config, pipeline_folder, train_text_encoder):
    from diffusers import StableDiffusionPipeline

    trainer = train(toy_config(train__learning_rate=1e-2, train_text_encoder=train_text_encoder))
    evaluation = trainer.run.evaluator()
    plain = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)

    def sample():
        latents = trainer.run.model.init_latents(generators(range(2), 0, "evaluation"))
        prompts = evaluation.prompts[:2]
        return plain(prompts, latents=latents, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images

    base = sample()
    plain.load_lora_weights(checkpoints_of(trainer.run.folder)[-1])
    assert (sample() - evaluation.images).abs().max() < 1e-4
    assert (base - evaluation.images).abs().max() > 1e-2


def test_held_out_evaluation_during_training_changes_no_step(toy_config):
    often, never = (train(toy_config(run_name=f"e{freq}", eval_freq=freq, eval_base_distance=True)) for freq in (1, 0))
    assert rows(often, "train") == rows(never, "train")


def test_training_may_take_fewer_sampler_steps_than_evaluation(toy_config, monkeypatch):
    trainer = AlignPropTrainer(toy_config(train__num_inference_steps=2, num_inference_steps=5, num_epochs=1))
    run, times = trainer.run, []
    predict = run.model.predict
    monkeypatch.setattr(run.model, "predict", lambda x, t, branch: times.append(int(t)) or predict(x, t, branch))
    run.evaluator()
    assert (
        sorted(set(times), reverse=True) == run.evaluator.rollouts[0].sampler.timesteps.tolist()
        and len(set(times)) == 5
    )
    times.clear()
    row = trainer.step()
    assert sorted(set(times), reverse=True) == run.rollout.sampler.timesteps.tolist() and len(set(times)) == 2
    assert len(row["adjoint_norm"]) == 3 and row["grad_norm"] > 0
    trainer.train()
    assert [r["step"] for r in rows(trainer, "eval")] == [2]


def test_no_estimator_without_gradient_trains(toy_config):
    with pytest.raises(ConfigError, match="estimator = 'none' is not one of"):
        AlignPropTrainer(toy_config(estimator="none"))


def test_any_callable_is_a_reward_for_the_library(toy_config):
    trainer = AlignPropTrainer(toy_config(), lambda images, prompts, metadata: images.mean(dim=(1, 2, 3)))
    assert trainer.step()["grad_norm"] > 0
