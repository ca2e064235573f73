import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop.engine.optimizers import OPTIMIZERS
from alignprop.lora.factors import trainable_parameters
from alignprop.lora.files import LORA_FILE
from alignprop.runs.checkpoint import checkpoints_of, read_state
from alignprop.settings.errors import ConfigError
from alignprop.trainer import AlignPropTrainer
from alignprop.weights import load_denoiser
from tests.helpers.training import half_precision, train, weights


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


@pytest.mark.parametrize("use_lora", [True, False])
def test_others_may_read_the_weights_as_they_may_read_other_new_files(toy_config, tmp_path, use_lora):
    (tmp_path / "new").write_text("")
    checkpoint = checkpoints_of(train(toy_config(num_epochs=1, use_lora=use_lora)).run.folder)[-1]
    modes = {file.stat().st_mode for file in checkpoint.rglob("*.safetensors")}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_another_optimizer_is_refused_at_resume(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match=r"train.optimizer = 'adamw', this run has 'sgd'"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder), train__optimizer="sgd"))


def test_another_rank_is_refused_at_resume(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match="lora_rank = 4, this run has 8"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder), lora_rank=8))


@pytest.mark.parametrize("use_lora", [True, False])
def test_weights_that_are_not_finite_are_refused(toy_config, use_lora):
    """Of a training state, and of a fine-tuned denoiser that is only evaluated."""
    first = train(toy_config(run_name="r", num_epochs=1, use_lora=use_lora))
    checkpoint = checkpoints_of(first.run.folder)[-1]
    state = read_state(checkpoint)
    next(iter(state["weights"].values())).fill_(float("inf"))
    again = AlignPropTrainer(toy_config(run_name="other", use_lora=use_lora))
    with pytest.raises(ConfigError, match=r"resume_from = .*: 1 of \d+ tensors hold NaN or infinity"):
        again.weights.load(state, checkpoint)
    if not use_lora:
        file = next((checkpoint / "denoiser").glob("*.safetensors"))
        save_file(load_file(file) | {"conv_in.bias": torch.full((16,), float("nan"))}, file)
        with pytest.raises(
            ConfigError, match=r"denoiser': 1 of \d+ tensors hold NaN or infinity, such as 'conv_in.bias'"
        ):
            load_denoiser(again.run.model.denoiser, checkpoint / "denoiser")


def test_overrides_count_when_resuming(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    again = AlignPropTrainer(toy_config(resume_from=str(first.run.folder), train__learning_rate=5e-4))
    assert [group["lr"] for group in again.weights.optimizer.param_groups] == [5e-4]
    assert again.weights.optimizer.state_dict()["state"][0]["step"] == 2


def test_a_lora_checkpoint_does_not_resume_full_fine_tuning(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    with pytest.raises(ConfigError, match=r"use_lora or pretrained.model differ"):
        AlignPropTrainer(toy_config(resume_from=str(first.run.folder), use_lora=False))


def test_a_non_finite_step_is_skipped_counted_and_ends_the_run_after_n(toy_config, monkeypatch):
    config = toy_config(reward_fn="tests.helpers.toy_rewards:Explodes", eval_reward_fn="", train__max_skipped_steps=3)
    with pytest.raises(ConfigError, match="3 optimizer steps in a row had a non-finite"):
        train(config)
    trainer = AlignPropTrainer(
        toy_config(run_name="other", reward_fn="tests.helpers.toy_rewards:Explodes", eval_reward_fn="")
    )
    trainer.run.reward.terms["tests.helpers.toy_rewards:Explodes"].function.calls = -1  # finite in the first step only
    trainer.step()
    before = weights(trainer)
    row = trainer.step()
    assert row["skipped_steps"] == 1 and torch.equal(weights(trainer), before)


def test_a_run_that_skips_all_of_its_steps_ends_with_an_error_and_says_so(toy_config, capsys):
    """Though it has fewer of them than may be skipped in a row."""
    config = toy_config(
        reward_fn="tests.helpers.toy_rewards:Explodes", eval_reward_fn="", per_gpu_capacity=4, num_epochs=2
    )
    trainer = AlignPropTrainer(config)
    trainer.run.reward.terms["tests.helpers.toy_rewards:Explodes"].function.calls = 1
    with pytest.raises(ConfigError, match="4 optimizer steps in a row had a non-finite"):
        trainer.train()
    told = capsys.readouterr().out
    assert [f"step {n}: skipped, its loss or gradient is not finite" in told for n in (1, 2, 3)] == [True] * 3


def test_skipped_steps_are_told_at_the_end(toy_config, capsys):
    config = toy_config(reward_fn="tests.helpers.toy_rewards:Explodes", eval_reward_fn="", per_gpu_capacity=4)
    trainer = AlignPropTrainer(config)
    trainer.run.reward.terms["tests.helpers.toy_rewards:Explodes"].function.calls = -1  # finite in the first steps only
    trainer.train()
    assert "skipped, because not finite: " in capsys.readouterr().out


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


def test_non_finite_losses_under_loss_scaling_are_skipped_too(toy_config, monkeypatch):
    half_precision(monkeypatch, torch.float16, scale=2.0**12)
    trainer = AlignPropTrainer(toy_config(reward_fn="tests.helpers.toy_rewards:Explodes", eval_reward_fn=""))
    trainer.run.reward.terms["tests.helpers.toy_rewards:Explodes"].function.calls = -1  # finite in the first step only
    assert [trainer.step()["skipped_steps"] for _ in range(3)] == [0, 1, 2]


def test_bfloat16_trains_a_float32_adapter(toy_config):
    trainer = AlignPropTrainer(toy_config(mixed_precision="bf16"))
    assert trainer.run.model.denoiser.conv_in.weight.dtype == torch.bfloat16
    before = weights(trainer)
    assert trainer.step()["grad_norm"] > 0
    assert before.dtype == torch.float32 and not torch.equal(weights(trainer), before)


def test_full_fine_tuning_in_half_precision_starts_from_the_exact_weights(toy_config, pipeline_folder):
    trainer = AlignPropTrainer(toy_config(mixed_precision="bf16", use_lora=False))
    stored = load_file(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors")
    trained = trainable_parameters(trainer.run.model.denoiser)
    assert trained.keys() == stored.keys() and all(torch.equal(p, stored[name]) for name, p in trained.items())
    assert trainer.run.model.decoder.dtype == torch.bfloat16
    before = weights(trainer)
    assert trainer.step()["grad_norm"] > 0 and not torch.equal(weights(trainer), before)


def test_skipped_steps_are_counted_on(toy_config):
    first = AlignPropTrainer(toy_config(run_name="r", train__max_skipped_steps=3))
    first.run.open_folder(0)
    first.weights.update(torch.tensor([float("nan")]))
    first.save()
    first.run.records.close()
    again = AlignPropTrainer(toy_config(run_name="r", resume_from="latest", train__max_skipped_steps=3))
    assert again.step()["skipped_steps"] == 1
    again.weights.update(torch.tensor([float("nan")]))
    assert (again.weights.skipped, again.weights.skipped_in_a_row) == (2, 1)


def test_the_options_of_now_are_there_when_the_moments_are_loaded(toy_config, monkeypatch):
    """With a fused AdamW torch puts the moments, step count included, where the parameters are: on loading."""
    first = train(toy_config(run_name="r", num_epochs=1))
    load, given = torch.optim.AdamW.load_state_dict, []
    recorded = lambda o, s: given.append(s["param_groups"]) or load(o, s)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", recorded)
    fused = lambda p, t: torch.optim.AdamW(p, 0.5, fused=True)  # noqa: E731
    monkeypatch.setitem(OPTIMIZERS, "adamw", fused)
    again = AlignPropTrainer(toy_config(resume_from=str(first.run.folder)))
    assert [(group["fused"], group["lr"]) for group in given[0]] == [(True, 0.5)]
    assert again.weights.optimizer.param_groups[0]["fused"]
    assert again.step()["grad_norm"] > 0
