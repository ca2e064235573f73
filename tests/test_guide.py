"""Reward guidance: its gradients against plain autograd, what it must leave alone, and that it climbs."""

import json

import pytest
import torch

from alignprop.guide import RewardGuidance, step_weights
from alignprop.models.sd import StableDiffusion
from alignprop.policies import MemoryPolicy
from alignprop.rollout import Rollout
from alignprop.samplers import ddim_sampler
from alignprop.seeding import generators
from alignprop.tasks import guide
from rewards.base import RewardError
from tests.test_rollout import guided, relative_difference
from tests.toy_rewards import redness

STEPS, PROMPTS = 5, ["a cat", "two dogs", "a red circle"]


@pytest.fixture
def model(pipelines):
    return StableDiffusion.load(str(pipelines["v_prediction"]))


def make_guidance(model, memory=None, eta=0.0, **options):
    rollout = Rollout(model, ddim_sampler(model.scheduler, STEPS, eta), 3.0, memory=memory)
    fields = dict(strength=0.05, through="denoiser", schedule="constant", window=(0.0, 1.0)) | options
    return RewardGuidance(rollout, redness, **fields)


def sample(guidance, rows=slice(None)):
    prompts = PROMPTS[rows]
    cond = guidance.rollout.model.encode_prompts(prompts)
    return guidance(generators(range(3), "x")[rows], cond, prompts, [{}] * len(prompts))


@pytest.mark.parametrize("through", ["denoiser", "x0"])
@pytest.mark.parametrize("batching", ["joint", "split"])
def test_the_gradient_is_autograds(model, through, batching):
    guidance = make_guidance(model, MemoryPolicy(guidance_batching=batching), through=through)
    sampler, cond = guidance.rollout.sampler, model.encode_prompts(PROMPTS)
    latents = model.init_latents(generators(range(3), "x"))
    f, ours = guidance.gradient(2, latents, cond, PROMPTS, [{}] * 3)
    x = latents.clone().requires_grad_()
    output = guided(model, x, sampler.timesteps[2], cond, 3.0)
    clean = float(sampler.p[2]) * x + float(sampler.q[2]) * output
    at = x if through == "denoiser" else clean
    (expected,) = torch.autograd.grad(redness(model.decode(clean), PROMPTS, None).sum(), at)
    assert expected.norm() > 0 and relative_difference(ours, expected) <= 1e-5
    assert relative_difference(f, output.detach()) <= 1e-5


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_outside_of_the_window_it_is_the_plain_chain(model, eta):
    guidance = make_guidance(model, eta=eta, window=(0.0, 0.01))  # no step's middle lies in it
    with torch.no_grad():
        plain = guidance.rollout(generators(range(3), "x"), model.encode_prompts(PROMPTS), None)
    assert torch.equal(sample(guidance), plain)
    assert not torch.equal(sample(make_guidance(model, eta=eta, window=(0.0, 0.2))), plain)


@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_guided_pictures_score_higher(model, through):
    guidance = make_guidance(model, through=through)
    with torch.no_grad():
        plain = guidance.rollout(generators(range(3), "x"), model.encode_prompts(PROMPTS), None)
        scores = [redness(model.decode(latents), PROMPTS, None) for latents in (sample(guidance), plain)]
    assert (scores[0] > scores[1]).all()


def test_a_step_has_the_length_that_it_is_given(model):
    """With one guided step, the last, the latents move by `strength` times their length."""
    guidance = make_guidance(model, strength=0.2, window=(0.8, 1.0))
    with torch.no_grad():
        plain = guidance.rollout(generators(range(3), "x"), model.encode_prompts(PROMPTS), None)
    moved = (sample(guidance) - plain).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, 0.2 * plain.flatten(1).norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("memory", [MemoryPolicy(sweep_chunk=1), MemoryPolicy(sweep_chunk=2)])
def test_the_batch_does_not_matter(model, memory):
    together, alone = sample(make_guidance(model)), sample(make_guidance(model), slice(1, 2))
    assert relative_difference(alone[0], together[1]) <= 1e-4
    assert relative_difference(sample(make_guidance(model, memory, decode_chunk=1)), together) <= 1e-4


def test_schedules_follow_the_noise():
    from diffusers import DDIMScheduler

    sampler = ddim_sampler(DDIMScheduler(), 10)
    falling, rising = (step_weights(sampler, name, (0.0, 1.0)) for name in ("noise", "late"))
    assert (falling.diff() < 0).all() and (rising.diff() > 0).all()
    assert min(falling.min(), rising.min()) >= 0 and max(falling.max(), rising.max()) <= 1
    assert step_weights(sampler, "constant", (0.2, 0.5)).tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]


FIELDS = dict(
    task="guide", num_eval_images=2, max_vis_images=2, guide__strength=0.05, reward_fn="tests.toy_rewards:redness",
    eval_reward_fn="tests.toy_rewards:contrast",
)  # fmt: skip


def test_the_report_has_all_variants(toy_config, tmp_path):
    from tests.training import train

    trained = train(toy_config(run_name="tuned", num_epochs=1, train__learning_rate=1e-2))
    folder = guide(toy_config(**FIELDS, resume_from=str(trained.run.folder)))
    report = json.loads((folder / "guide.json").read_text())
    assert list(report) == ["plain", "guided", "fine-tuned plain", "fine-tuned guided"]
    score = {name: found["tests.toy_rewards:redness"]["mean"] for name, found in report.items()}
    assert score["guided"] > score["plain"] and score["fine-tuned guided"] > score["fine-tuned plain"]
    assert score["plain"] != score["fine-tuned plain"] and report["plain"]["seconds_per_picture"] > 0
    assert all((folder / name).exists() for name in ("comparison.png", "guide.png", "plain/scores.csv"))


def test_a_reward_without_gradient_cannot_guide(toy_config):
    with pytest.raises(RewardError, match="differentiable=False"):
        guide(toy_config(**(FIELDS | dict(reward_fn="tests.toy_rewards:hidden_rating"))))
