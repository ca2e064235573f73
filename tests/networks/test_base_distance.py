"""The distance to the base model: zero, closed form, gradient, and what it does not depend on."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from alignprop.engine.seeding import generator, generators
from alignprop.lora.factors import add_lora, trainable_parameters
from alignprop.lora.scaling import scale_lora
from alignprop.method.base_distance import base_distance, chain_distance
from alignprop.method.chain import Sampler
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.models.base import select
from alignprop.models.sd import StableDiffusion

TIMES = torch.tensor([7, 5, 2])
ALPHA = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
SIGMA = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(3, 3).requires_grad_(False)


def toy(guidance_scale=3.0):
    """f(x, t) = t · (W + 2·B·A) x for vectors x, whose unconditional branch gives nonsense."""
    layer = Layer()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]), layer, "default")
    layer.double()
    for name, parameter in layer.named_parameters():
        parameter.data.normal_(generator=generator(name))
    model = SimpleNamespace(
        branches=lambda cond, scale: [{"c": cond["c"] * torch.nan}, cond] if scale != 1 else [cond],
        predict=lambda x, t, branch: t[:, None] * branch["c"] * layer.to_q(x),
    )
    zeros = torch.zeros(3)
    sampler = Sampler(TIMES, zeros, zeros, zeros, alpha=ALPHA, sigma=SIGMA)
    f = SimpleNamespace(guidance_scale=guidance_scale, autocast=nullcontext, scale_lora=lambda timestep: None)
    return SimpleNamespace(model=model, denoiser=layer, sampler=sampler, f=f)


def closed_form(rollout, latents, steps, noise):
    """Mean of (t · c · 2·B·A·x)² over the 3 components of each sample."""
    a, b = (getattr(rollout.denoiser.to_q, name)["default"].weight for name in ("lora_A", "lora_B"))
    x = ALPHA[steps, None] * latents + SIGMA[steps, None] * noise
    return (TIMES[steps, None] * 0.5 * 2 * x @ a.T @ b.T).square().mean(dim=1)


def inputs(count=4):
    latents, noise = torch.randn(2, count, 3, generator=generator("toy"), dtype=torch.float64)
    return latents, {"c": torch.full((count, 1), 0.5, dtype=torch.float64)}, torch.arange(count) % 3, noise


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_it_is_the_mean_square_of_what_the_adapter_adds(guidance_scale):
    rollout, (latents, cond, steps, noise) = toy(guidance_scale), inputs()
    found = base_distance(rollout, latents, cond, steps, noise)
    torch.testing.assert_close(found, closed_form(rollout, latents, steps, noise))
    assert found.min() > 0


def test_its_gradient_is_that_of_the_closed_form_and_reaches_the_adapter_alone():
    rollout, (latents, cond, steps, noise) = toy(), inputs()
    parameters = list(trainable_parameters(rollout.denoiser).values())
    latents.requires_grad_()
    found = base_distance(rollout, latents, cond, steps, noise)
    expected = torch.autograd.grad(closed_form(rollout, latents, steps, noise).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), parameters, retain_graph=True), expected)
    assert torch.autograd.grad(found.sum(), latents, allow_unused=True) == (None,)
    assert len(parameters) == 2


def test_the_chain_is_measured_in_the_middle_of_its_quarters():
    rollout, (latents, cond, _, _) = toy(), inputs()
    rollout.sampler = SimpleNamespace(**{**vars(rollout.sampler), "scale": torch.ones(12, dtype=torch.float64)})
    for name in ("alpha", "sigma", "timesteps"):  # of 12 steps, of which only these count
        table = torch.full((12 + (name != "timesteps"),), torch.nan, dtype=torch.float64)
        table[[1, 4, 7, 10]] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        rollout.sampler = SimpleNamespace(**{**vars(rollout.sampler), name: table})
    rollout.sampler.num_steps = 12
    found = chain_distance(rollout, latents, cond, generators(range(4), "z"))
    noises = torch.stack([torch.randn(4, 3, generator=g) for g in generators(range(4), "z")])
    a, b = (getattr(rollout.denoiser.to_q, name)["default"].weight for name in ("lora_A", "lora_B"))
    parts = [(k * (k * latents + k * noises[:, k - 1].double()) @ a.T @ b.T).square().mean(dim=1) for k in (1, 2, 3, 4)]
    torch.testing.assert_close(found, torch.stack(parts).mean(dim=0))
    assert not found.requires_grad


def test_an_adapter_that_changes_along_the_chain_counts_at_each_step_as_it_does_there():
    rollout, (latents, cond, _, _) = toy(), inputs()
    whole = chain_distance(rollout, latents, cond, generators(range(4), "z"))
    seen = []
    rollout.f.scale_lora = lambda t: seen.append(t.item()) or scale_lora(rollout.denoiser, 0.5)
    halved = chain_distance(rollout, latents, cond, generators(range(4), "z"))
    torch.testing.assert_close(halved, whole / 4)
    assert seen == TIMES.tolist()


# ---- a real denoiser


@pytest.fixture
def rollout(pipeline_folder):
    model = StableDiffusion.load(str(pipeline_folder))
    add_lora(model.denoiser, 2, 2.0, ("to_q", "to_v"), seed=0)
    return Rollout(model, build_sampler(model.scheduler, 5, 0.0), 3.0)


def move(rollout, seed=0):
    for name, parameter in trainable_parameters(rollout.denoiser).items():
        parameter.data.normal_(0, 0.5, generator=generator(name, seed))


def measure(rollout, rows=slice(None)):
    cond = rollout.model.encode_prompts(["a cat", "a dog", "a bird"])
    latents = rollout.model.init_latents(generators(range(3), "x"))
    return chain_distance(rollout, latents[rows], select(cond, rows), generators(range(3)[rows], "z"))


def test_a_fresh_adapter_is_the_base(rollout):
    assert measure(rollout).tolist() == [0.0, 0.0, 0.0]
    move(rollout)
    assert measure(rollout).min() > 0


def test_a_samples_distance_does_not_depend_on_the_others(rollout):
    move(rollout)
    torch.testing.assert_close(measure(rollout, slice(1, 3)), measure(rollout)[1:], rtol=1e-4, atol=0)


def test_samples_at_steps_of_their_own(rollout):
    move(rollout)
    cond = rollout.model.encode_prompts(["a cat", "a dog", "a bird"])
    latents, noise = (rollout.model.init_latents(generators(range(3), name)) for name in "xz")
    steps = torch.tensor([4, 0, 2])
    together = base_distance(rollout, latents, cond, steps, noise)
    alone = [base_distance(rollout, latents[[b]], select(cond, [b]), steps[[b]], noise[[b]]) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=0)


def test_what_is_trained_stays_so_and_counts_again(rollout):
    move(rollout)
    trained, x = list(trainable_parameters(rollout.denoiser)), torch.ones(1, 4, 8, 8)
    t, cond = torch.tensor(3), rollout.model.encode_prompts(["a cat"])
    before = rollout.f(x, t, cond)
    measure(rollout)
    assert list(trainable_parameters(rollout.denoiser)) == trained and torch.equal(rollout.f(x, t, cond), before)
