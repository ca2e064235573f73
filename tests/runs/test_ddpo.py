"""DDPO against closed forms, plain autograd and itself: the policy, its gradient, and what an epoch is made of."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal

from alignprop.ddpo import DDPOTrainer
from alignprop.engine.seeding import generator
from alignprop.lora.files import LORA_FILE
from alignprop.method.chain import Sampler
from alignprop.method.guidance import GuidedDenoiser
from alignprop.method.policy_gradient import PromptStatistics, clipped_loss, log_probability
from alignprop.prompts import count_draws, draw_prompts
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import resolve
from alignprop.trainer import AlignPropTrainer
from config import align_prop, ddpo
from tests.cli.test_main import flags
from tests.distributed.test_processes import assert_rows_agree, difference
from tests.helpers import warm
from tests.helpers.training import rows, weights

# The network sees scaled latents. The last of the four steps has no noise, so three can be updated, as with DDIM.
ANCESTRAL = {"sampler": "EulerAncestralDiscrete", "eta": 0.0, "num_inference_steps": 4}


@pytest.fixture
def ddpo_config(toy_config):
    """`toy_config` with a policy that differs from one sample to the next, and a reward without gradient."""
    defaults = dict(
        algorithm="ddpo", eta=1.0, reward_fn="tests.helpers.toy_rewards:hidden_rating", ddpo__clip_range=0.1,
        num_inference_steps=3,
    )  # fmt: skip
    return lambda **overrides: toy_config(**{**defaults, **overrides})


def shake(trainer, size=0.3, key="w"):
    for n, parameter in enumerate(trainer.weights.parameters):
        parameter.data += size * torch.randn(parameter.shape, generator=generator(key, n))


def sampled(trainer, indices=range(4)):
    """Trajectories, without their scores."""
    return trainer.sample((0, 0), torch.tensor(list(indices)))[0]


def gradient(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.weights.parameters])


# ---- the parts


def test_the_log_probability_is_a_normal_distributions():
    a, b, s = (torch.tensor([x], dtype=torch.float64) for x in (0.9, -0.4, 0.3))
    sampler = Sampler(timesteps=torch.tensor([1]), a=a, b=b, s=s)
    x, f, x_next = torch.randn(3, 2, 4, 5, 5, generator=generator("x"))
    expected = Normal(0.9 * x - 0.4 * f, 0.3).log_prob(x_next).flatten(1).mean(dim=1)
    found = log_probability(sampler, 0, x, f, x_next)
    assert found.shape == (2,)
    torch.testing.assert_close(found, expected)


def test_the_loss_counts_the_ratio_within_the_clip_alone():
    ratio = torch.tensor([1.0, 1.05, 1.3, 0.7, 1.3, 0.7], requires_grad=True)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, -2.0, 2.0])
    losses = clipped_loss(ratio, advantages, 0.1)
    torch.testing.assert_close(losses, torch.tensor([-2.0, 2.1, -2.2, 1.8, 2.6, -1.4]))
    losses.sum().backward()
    # Past the clip in the direction of the advantage: no gradient; in the other: that of the way back.
    assert ratio.grad.tolist() == [-2.0, 2.0, 0.0, 0.0, 2.0, -2.0]


def test_advantages_are_those_among_a_prompts_newest_rewards():
    statistics = PromptStatistics(size=3, min_count=2)
    # Of "b" there is one: the epoch's mean 2 and deviation sqrt(14 / 4) count.
    found = statistics.advantages(["a", "a", "b", "a"], torch.tensor([1.0, 2.0, 0.0, 5.0]))
    own = [(r - 8 / 3) / math.sqrt(26 / 9) for r in (1, 2, 5)]
    assert found.tolist() == pytest.approx([own[0], own[1], -2 / math.sqrt(14 / 4), own[2]], rel=1e-5)
    # Three of "a" are kept, with the newest: 2, 5, 8; those of "b" are enough now.
    found = statistics.advantages(["a", "b"], torch.tensor([8.0, 4.0]))
    assert found.tolist() == pytest.approx([3 / math.sqrt(6), 1.0], rel=1e-5)


def test_without_a_buffer_prompts_share_the_epochs_statistics():
    statistics = PromptStatistics(size=0, min_count=1)
    statistics.advantages(["a", "b"], torch.tensor([100.0, -100.0]))
    found = statistics.advantages(["a", "a", "b"], torch.tensor([1.0, 2.0, 6.0]))
    assert found.tolist() == pytest.approx([x / math.sqrt(14 / 3) for x in (-2, -1, 3)], rel=1e-5)


def test_equal_rewards_have_no_advantage():
    assert PromptStatistics(4, 1).advantages(["a", "b", "a"], torch.full((3,), 7.0)).tolist() == [0.0] * 3


# ---- the gradient


@pytest.mark.parametrize("memory", [
    {}, {"guidance_batching": "split"}, {"sweep_chunk": 1}, {"sweep_chunk": 3, "lean": True},
    {"block_checkpointing": True},
])  # fmt: skip
@pytest.mark.parametrize("own", [{}, ANCESTRAL], ids=["ddim", "ancestral"])
def test_the_first_update_has_a_ratio_of_exactly_1(ddpo_config, memory, own):
    overrides = {f"memory__{name}": value for name, value in memory.items()} | own
    trainer = DDPOTrainer(ddpo_config(train__total_samples_per_epoch=4, **overrides))
    shake(trainer)
    row = trainer.step()
    assert row["ratio_mean"] == 1 and row["clip_fraction"] == 0 and row["approx_kl"] == 0
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("overrides", [
    {}, {"memory__sweep_chunk": 1}, {"memory__guidance_batching": "split"}, {"memory__lean": True},
    {"guidance_scale": 1.0}, {"ddpo__timestep_fraction": 0.6}, ANCESTRAL,
])  # fmt: skip
def test_the_update_is_the_gradient_of_the_clipped_objective(ddpo_config, monkeypatch, overrides):
    """With other weights than those that sampled, so that ratios differ from 1 and some are clipped."""
    trainer = DDPOTrainer(ddpo_config(**overrides))
    shake(trainer)
    run, advantages = trainer.run, torch.tensor([1.0, -0.5, 2.0, -3.0], dtype=torch.float64)
    block = sampled(trainer)
    drawn = torch.randperm(3, generator=generator("steps"))[: 2 if "ddpo__timestep_fraction" in overrides else 3]
    shake(trainer, 0.02, "shift")

    sampler, f, ratios, of = run.rollout.sampler, GuidedDenoiser(run.model, run.rollout.f.scale), [], []
    for samples in block:
        cond = run.model.encode_prompts(draw_prompts(trainer.prompts, 0, 0, samples.indices)[0])
        for i in drawn.tolist():
            seen = sampler.scale[i] * samples.latents[i]
            mean = sampler.a[i] * samples.latents[i] + sampler.b[i, i] * f(seen, sampler.timesteps[i], cond)
            policy = Normal(mean.float(), float(sampler.s[i, i]))
            told = policy.log_prob(samples.latents[i + 1]).flatten(1).mean(dim=1)
            ratios.append((told - samples.log_probabilities[i]).exp())
            of.append(advantages[samples.indices].float())
    ratios, of = torch.cat(ratios), torch.cat(of)
    trainer.config.ddpo.clip_range = clip = (ratios - 1).abs().median().item()  # half of them are clipped
    losses = -torch.minimum(of * ratios, of * ratios.clamp(1 - clip, 1 + clip))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), trainer.weights.parameters)])

    found = {}
    monkeypatch.setattr(trainer.weights, "update", lambda told: found.update(g=gradient(trainer), n=len(told)) or 0.0)
    loss, _, ratio, clipped, divergence = trainer.update(block, advantages, generator("steps"))
    assert clipped == pytest.approx(0.5, abs=0.13) and found["n"] == len(losses) == 4 * len(drawn)
    assert (found["g"] - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0
    told = losses.mean().item(), ratios.mean().item(), ratios.log().square().mean().item() / 2
    assert (loss, ratio, divergence) == pytest.approx(told, rel=1e-3)


def test_without_advantage_there_is_no_gradient(ddpo_config):
    trainer = DDPOTrainer(ddpo_config())
    shake(trainer)
    (first, second) = sampled(trainer, [0, 1]), sampled(trainer, [2, 3])
    trainer.add_gradients(first[0], 1, torch.zeros(4), 1)
    assert not gradient(trainer).any()
    trainer.add_gradients(second[0], 1, torch.ones(4), 1)
    assert gradient(trainer).any()


@pytest.mark.parametrize(("advantage", "passes"), [(1.0, False), (-1.0, True)])
def test_a_step_that_has_become_likelier_than_the_clip_allows_is_not_made_likelier(ddpo_config, advantage, passes):
    trainer = DDPOTrainer(ddpo_config())
    shake(trainer)
    (samples,) = sampled(trainer)
    samples.log_probabilities[0] -= 0.2
    told = trainer.add_gradients(samples, 0, torch.full((4,), advantage), 1)
    assert gradient(trainer).any() == passes
    assert told[1].tolist() == pytest.approx([math.exp(0.2)] * 4) and told[2].tolist() == [1.0] * 4


def test_steps_without_noise_are_left_out(ddpo_config, monkeypatch):
    trainer = DDPOTrainer(ddpo_config(train__total_samples_per_epoch=4))
    rollout, seen = trainer.run.rollout, []
    rollout.sampler = replace(rollout.sampler, s=rollout.sampler.s * torch.tensor([1.0, 0.0, 1.0]))
    add = trainer.add_gradients
    monkeypatch.setattr(trainer, "add_gradients", lambda samples, i, *rest: seen.append(i) or add(samples, i, *rest))
    row = trainer.step()
    assert sorted(set(seen)) == [0, 2] and row["ratio_mean"] == 1 and row["grad_norm"] > 0


def test_so_are_steps_with_little_noise(ddpo_config):
    noise = DDPOTrainer(ddpo_config()).run.rollout.sampler.s.diagonal()
    assert noise.argmin() == 2
    trainer = DDPOTrainer(ddpo_config(run_name="m", ddpo__min_noise=float(noise[2]) + 1e-6))
    assert trainer.noisy_steps(trainer.run.rollout) == [0, 1]
    with pytest.raises(ConfigError, match=r"^ddpo\.min_noise = 3\.0 must be less than the noise of"):
        DDPOTrainer(ddpo_config(ddpo__min_noise=3.0))


# ---- an epoch


def test_an_epoch_is_a_step_with_all_its_updates(ddpo_config, monkeypatch):
    config = ddpo_config(train__total_samples_per_epoch=12, ddpo__inner_epochs=2, ddpo__timestep_fraction=0.34)
    trainer, seen, calls = DDPOTrainer(config), [], []
    update, add = trainer.weights.update, trainer.add_gradients
    monkeypatch.setattr(trainer.weights, "update", lambda losses: seen.append(len(losses)) or update(losses))
    monkeypatch.setattr(
        trainer, "add_gradients", lambda samples, i, *rest: calls.append((samples, i)) or add(samples, i, *rest)
    )
    row = trainer.step()
    assert seen == [4] * 6 and row["updates"] == 6 and row["samples"] == 12 and row["step"] == trainer.global_step == 1
    assert row["ratio_mean"] != 1 and row["approx_kl"] > 0  # of the later updates
    passes = [[int(j) for samples, _ in part for j in samples.indices] for part in (calls[:6], calls[6:])]
    assert all(sorted(indices) == list(range(12)) for indices in passes)  # each sample once a pass
    assert len({i for _, i in calls}) > 1
    assert trainer.step()["samples"] == 24 and trainer.last_step == config.num_epochs


def test_rewards_and_advantages_belong_to_their_samples(ddpo_config):
    trainer = DDPOTrainer(ddpo_config(per_gpu_capacity=2, memory__sweep_chunk=1, memory__decode_chunk=1))
    shake(trainer)
    seen = {}
    advantages = trainer.statistics.advantages
    trainer.statistics.advantages = lambda p, r: seen.update(prompts=p, rewards=r) or advantages(p, r)
    row, expected = trainer.step(), []
    other = DDPOTrainer(ddpo_config(run_name="other"))
    shake(other)
    for j in range(8):
        (samples,), (reward, _) = other.sample((0, 0), torch.tensor([j]))
        expected.append(reward.item())
        assert samples.prompts == [seen["prompts"][j]]
    assert seen["rewards"].tolist() == pytest.approx(expected, rel=1e-4)
    assert row["reward"] == pytest.approx(sum(expected) / 8, rel=1e-4) and len({round(r, 4) for r in expected}) > 4


def test_stopping_and_resuming_changes_nothing(ddpo_config):
    options = dict(eval_freq=2, save_freq=2, ddpo__per_prompt_buffer=5, ddpo__per_prompt_min_count=4)
    whole, half = (DDPOTrainer(ddpo_config(run_name=n, num_epochs=e, **options)) for n, e in (("w", 4), ("p", 2)))
    whole.train()
    half.train()
    parts = DDPOTrainer(ddpo_config(num_epochs=4, resume_from=str(half.run.folder), **options))
    assert parts.statistics.rewards == half.statistics.rewards and max(map(len, half.statistics.rewards.values())) == 5
    parts.train()
    assert torch.equal(weights(parts), weights(whole)) and rows(parts) == rows(whole)
    assert parts.statistics.rewards == whole.statistics.rewards


def test_the_micro_batch_changes_rounding_only(ddpo_config):
    found = []
    for capacity in (4, 2, 1):
        trainer = DDPOTrainer(ddpo_config(run_name=f"c{capacity}", per_gpu_capacity=capacity, ddpo__inner_epochs=2))
        shake(trainer)
        before = weights(trainer)
        row = trainer.step()
        found.append((weights(trainer) - before, [row[name] for name in ("reward", "loss", "grad_norm", "approx_kl")]))
    for change, numbers in found[1:]:
        assert numbers == pytest.approx(found[0][1], rel=1e-3)
        assert (change - found[0][0]).norm() < 1e-2 * change.norm()


def test_two_processes_train_like_one(ddpo_config):
    options = dict(per_gpu_capacity=2, ddpo__inner_epochs=2, train__total_samples_per_epoch=8, num_epochs=2)
    done = warm.call("main.py", *flags(ddpo_config(run_name="two", **options)), processes=2)
    assert done.returncode == 0, done.stderr
    one = DDPOTrainer(ddpo_config(run_name="one", **options))
    one.train()
    folders = one.run.folder, one.run.folder.with_name("two")
    files = [load_file(checkpoints_of(folder)[-1] / LORA_FILE) for folder in folders]
    assert difference(*files) == 0
    read = [list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())) for folder in folders]
    for ours, theirs in zip(*read, strict=True):
        assert_rows_agree(ours, theirs)
    state = [torch.load(checkpoints_of(f)[-1] / "training_state.pt", weights_only=True) for f in folders]
    assert state[0]["prompt_rewards"] == state[1]["prompt_rewards"]


def test_a_reward_without_gradient_is_followed(ddpo_config, deeper_pipeline):
    """The pictures get brighter on average: a policy gradient needs the reward's value alone."""
    trainer = DDPOTrainer(ddpo_config(
        num_epochs=8, train__total_samples_per_epoch=32, train__total_batch_size=16, per_gpu_capacity=16,
        num_inference_steps=4, num_eval_images=32, train__learning_rate=3e-2, save_freq=100, eval_reward_fn="",
        ddpo__clip_range=0.5, pretrained__model=deeper_pipeline,
    ))  # fmt: skip
    shake(trainer, 0.05)
    trainer.train()
    first, last = rows(trainer, "eval")
    assert last["reward"] > first["reward"] + 2 * (first["reward_std"] ** 2 / 32) ** 0.5


@pytest.mark.parametrize("algorithm", ["ddpo", "align_prop"])
def test_what_is_told_of_the_prompts_counts_every_sample(ddpo_config, toy_config, monkeypatch, capsys, algorithm):
    """A step of DDPO samples a whole epoch, and makes several updates with it."""
    counted = []
    monkeypatch.setattr("alignprop.prompts.count_draws", lambda *a: counted.append(count_draws(*a)) or counted[-1])
    options = dict(train__total_samples_per_epoch=12, num_epochs=2, num_eval_images=1)
    is_ddpo = algorithm == "ddpo"
    trainer = DDPOTrainer(ddpo_config(**options)) if is_ddpo else AlignPropTrainer(toy_config(**options))
    trainer.train()
    assert [sum(counts) for counts in counted] == [2 * 12]
    drawn = [count for count in counted[0] if count]
    assert f"{len(drawn)} of 4 were drawn, each {min(drawn)} to {max(drawn)} times" in capsys.readouterr().out


# ---- presets


@pytest.mark.parametrize("preset", ddpo.PRESETS)
def test_presets_are_whole(preset):
    config = resolve(ddpo.get_config(preset), num_processes=1)
    assert config.algorithm == "ddpo" and config.eta == 1 and config.train.steps_per_epoch == 1


def test_presets_of_stable_diffusion_have_the_authors_values():
    config = resolve(ddpo.get_config("compressibility"), num_processes=4)
    train, own = config.train, config.ddpo
    assert (config.num_inference_steps, config.guidance_scale, config.num_epochs) == (50, 5.0, 100)
    assert (train.total_samples_per_epoch, train.total_batch_size, train.learning_rate) == (256, 128, 3e-4)
    assert (train.adam_weight_decay, train.max_grad_norm, own.clip_range, own.adv_clip_max) == (1e-4, 1.0, 1e-4, 5.0)
    assert config.pretrained.model == align_prop.base().pretrained.model
