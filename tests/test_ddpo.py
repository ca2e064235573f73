"""DDPO: the policy's log-probability, its ratio, its gradient, its statistics, and a run that goes on."""

import pytest
import torch
from diffusers import DDIMScheduler

from alignprop.ddpo import DDPOTrainer, PromptStatistics, clipped_loss, log_probability
from alignprop.guidance import GuidedDenoiser
from alignprop.models.sd import StableDiffusion
from alignprop.samplers import ddim_sampler
from alignprop.seeding import generator
from alignprop.settings import ConfigError
from tests.training import rows, weights

FIELDS = dict(
    algorithm="ddpo", eta=1.0, train__total_batch_size=4, train__total_samples_per_epoch=8, train__learning_rate=1e-2,
    ddpo__clip_range=0.5, reward_fn="tests.toy_rewards:hidden_rating", eval_reward_fn="",
)  # fmt: skip


@pytest.fixture
def make_trainer(toy_config):
    def make(**fields):
        trainer = DDPOTrainer(toy_config(**(FIELDS | fields)))
        for j, parameter in enumerate(trainer.weights.parameters):
            if not parameter.any():  # a fresh adapter has B = 0, and A no gradient
                parameter.data.normal_(0, 0.05, generator=generator("b", j))
        return trainer

    return make


def test_log_probability_is_the_normal_distributions():
    sampler = ddim_sampler(DDIMScheduler(), 5, eta=1.0)
    x, f, x_next = torch.randn(3, 2, 4, 8, 8, generator=generator("p"), dtype=torch.float64)
    policy = torch.distributions.Normal(float(sampler.a[2]) * x + float(sampler.b[2]) * f, float(sampler.s[2]))
    expected = policy.log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(log_probability(sampler, 2, x, f, x_next), expected)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.0, 2.0, -2.0, -2.0), (1.2, 2.0, -2.2, 0.0), (0.8, 2.0, -1.6, -2.0), (1.2, -2.0, 2.4, 2.0), (0.8, -2.0, 1.8, 0.0),
])  # fmt: skip
def test_clipping_takes_the_pessimistic_side(ratio, advantage, loss, slope):
    ratio = torch.tensor([ratio], requires_grad=True)
    found = clipped_loss(ratio, torch.tensor([advantage]), clip_range=0.1)
    found.sum().backward()
    torch.testing.assert_close(found.item(), loss, rtol=1e-6, atol=0)
    assert ratio.grad.item() == slope


def test_statistics_of_a_prompt_once_there_are_enough():
    statistics = PromptStatistics(size=3, min_count=2)
    first = statistics.advantages(["a", "b"], torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]).double(), rtol=1e-5, atol=0)  # of the epoch
    second = statistics.advantages(["a", "a", "a"], torch.tensor([2.0, 3.0, 7.0]))
    kept = torch.tensor([2.0, 3.0, 7.0]).double()  # the newest three
    torch.testing.assert_close(second, (kept - 4.0) / kept.std(correction=0), rtol=1e-5, atol=0)
    shared = PromptStatistics(size=0, min_count=1)
    torch.testing.assert_close(shared.advantages(["a", "b"], torch.tensor([1.0, 5.0])), first)


@pytest.mark.parametrize("sweep_chunk", [0, 1])
def test_the_ratio_is_exactly_one_before_the_first_update(make_trainer, sweep_chunk):
    trainer = make_trainer(memory__sweep_chunk=sweep_chunk)
    several, _ = trainer.sample((0, 0), torch.arange(2))
    assert len(several) == (2 if sweep_chunk else 1)
    for samples in several:
        for i in trainer.run.rollout.sampler.s.nonzero().squeeze(1).tolist():
            _, ratios, clipped, _ = trainer.add_gradients(samples, i, torch.ones(2), 1)
            assert (ratios == 1).all() and not clipped.any()


def test_an_update_is_the_gradient_of_its_loss(make_trainer):
    """Against autograd through f of the same steps, with ratios that are not 1."""
    trainer = make_trainer(ddpo__clip_range=1e-3)
    (samples,), _ = trainer.sample((0, 0), torch.arange(2))
    parameters, advantages = trainer.weights.parameters, torch.tensor([0.7, -1.3])
    with torch.no_grad():
        for j, parameter in enumerate(parameters):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator("step", j))
    run, c, total = trainer.run, trainer.config, 0
    f, cond = GuidedDenoiser(run.model, c.guidance_scale), run.model.encode_prompts(samples.prompts)
    steps = run.rollout.sampler.s.nonzero().squeeze(1).tolist()
    for i in steps:
        output = f(samples.latents[i], run.rollout.sampler.timesteps[i], cond)
        ratio = (
            log_probability(run.rollout.sampler, i, samples.latents[i], output, samples.latents[i + 1])
            - samples.log_probabilities[i]
        ).exp()
        total = total + clipped_loss(ratio, advantages, 1e-3).sum() / (c.train.total_batch_size * len(steps))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    told = torch.stack([trainer.add_gradients(samples, i, advantages, len(steps)) for i in steps])
    ours = torch.cat([p.grad.flatten() for p in parameters]).float()
    assert told[:, 2].any() and not told[:, 2].all()  # some ratios are clipped, and some are not
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_no_advantage_gives_exactly_no_gradient(make_trainer):
    trainer = make_trainer()
    (samples,), _ = trainer.sample((0, 0), torch.arange(2))
    trainer.add_gradients(samples, 0, torch.zeros(2), 1)
    assert not any(p.grad.any() for p in trainer.weights.parameters)


def test_a_reward_without_gradient_is_followed(make_trainer):
    """The pictures get brighter on average: a policy gradient needs the reward's value alone."""
    trainer = make_trainer(
        num_epochs=12, train__total_samples_per_epoch=32, train__total_batch_size=16, per_gpu_capacity=16,
        num_inference_steps=4, num_eval_images=32, train__learning_rate=2e-2, save_freq=100,
    )  # fmt: skip
    trainer.train()
    first, last = rows(trainer, "eval")
    assert last["reward"] > first["reward"] + 2 * (first["reward_std"] ** 2 / 32) ** 0.5


def test_a_continued_run_is_the_uninterrupted_one(make_trainer, toy_config):
    statistics = dict(ddpo__per_prompt_buffer=4, ddpo__per_prompt_min_count=2)  # which have to be continued too
    whole = DDPOTrainer(toy_config(**(FIELDS | statistics), run_name="whole", num_epochs=3))
    whole.train()
    DDPOTrainer(toy_config(**(FIELDS | statistics), run_name="parts", num_epochs=2)).train()
    parts = DDPOTrainer(toy_config(**(FIELDS | statistics), run_name="parts", num_epochs=3, resume_from="latest"))
    assert parts.global_step == 2
    parts.train()
    assert torch.equal(weights(whole), weights(parts))
    assert rows(whole, "train") == rows(parts, "train")


def test_the_micro_batch_changes_rounding_only(toy_config):
    found = []
    for capacity in (4, 2):
        trainer = DDPOTrainer(toy_config(**FIELDS, per_gpu_capacity=capacity, num_epochs=1, run_name=f"c{capacity}"))
        trainer.train()
        found.append(weights(trainer))
    assert (found[0] - found[1]).norm() <= 1e-3 * found[0].norm()
    assert rows(trainer, "train")[0]["samples"] == 8 and rows(trainer, "train")[0]["updates"] == 2


def test_a_policy_needs_chance(toy_config, pipeline_folder):
    with pytest.raises(ConfigError, match=r"^eta = 0"):
        DDPOTrainer(toy_config(**(FIELDS | dict(eta=0.0))))
    model = StableDiffusion.load(str(pipeline_folder))
    model.scheduler = DDIMScheduler(set_alpha_to_one=True)  # whose last step, here the only one, has no noise
    with pytest.raises(ConfigError, match="no step with noise"):
        DDPOTrainer(toy_config(**(FIELDS | dict(num_inference_steps=1))), model=model)
