"""Every scheduler of diffusers that can be trained through: its pictures, and the gradient through its steps."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.overrides import TorchFunctionMode

from alignprop.engine.seeding import generator, generators
from alignprop.lora.factors import trainable_parameters
from alignprop.method import estimators
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.method.schedulers import make_scheduler, parse_options
from alignprop.settings.errors import ConfigError
from tests.unit.test_rollout import gradients_of, guided, make_model, relative_difference, reward

STEPS, BATCH, GUIDANCE = 5, 2, 2.0
PROMPTS = ["a cat", "two dogs"]

# name, options, network calls of 5 steps
DIFFUSION = [
    ("ddim", "", 5), ("DDPM", "", 5),
    ("EulerDiscrete", "", 5), ("EulerDiscrete", "use_karras_sigmas=True, timestep_spacing=trailing", 5),
    ("EulerDiscrete", "use_exponential_sigmas=True", 5), ("EulerDiscrete", "use_beta_sigmas=True", 5),
    ("EulerAncestralDiscrete", "", 5), ("HeunDiscrete", "", 9), ("LMSDiscrete", "", 5),
    ("PNDM", "skip_prk_steps=True", 6), ("PNDM", "skip_prk_steps=False", 14),
    ("DPMSolverMultistep", "", 5), ("DPMSolverMultistep", "use_karras_sigmas=True, solver_order=3", 5),
    ("DPMSolverMultistep", "algorithm_type=sde-dpmsolver++", 5), ("DPMSolverMultistep", "algorithm_type=dpmsolver, final_sigmas_type=sigma_min", 5),
    ("DPMSolverSinglestep", "", 5), ("DPMSolverSinglestep", "solver_order=3", 5),
    ("DPMSolverSinglestep", "algorithm_type=sde-dpmsolver++", 5),
    ("KDPM2Discrete", "", 9), ("KDPM2AncestralDiscrete", "", 9),
    ("UniPCMultistep", "", 5), ("UniPCMultistep", "solver_order=3", 5), ("DEISMultistep", "", 5),
    ("LCM", "", 5), ("TCD", "", 5), ("SASolver", "", 5),
]  # fmt: skip
IDS = [f"{name} {options}".strip() for name, options, _ in DIFFUSION]
# FLUX.1's and SD3's own shifts of the noise levels are in tests/runs/test_families.py.
FLOW = [
    ("ddim", "", 5), ("FlowMatchHeunDiscrete", "", 9), ("FlowMatchLCM", "", 5), ("DPMSolverMultistep", "", 5),
    ("UniPCMultistep", "", 5), ("DEISMultistep", "", 5), ("DPMSolverSinglestep", "", 5), ("SASolver", "", 5),
]  # fmt: skip


class InFloat64(TorchFunctionMode):
    """Keeps a scheduler's step in float64, on float32 noise, as a rollout draws it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.randn:
            return function(*args, **{**kwargs, "dtype": torch.float32}).double()
        if function is torch.Tensor.to and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **kwargs)


def plan_for(name, sampler):
    """The plan of an estimator, with draws that reach all parts of the chain."""
    estimator = estimators.build_estimator(name, first=sampler.num_steps - 2)
    return estimator(sampler, BATCH, generator("plan", name))


def by_autograd(model, scheduler, plan, eta, dtype):
    """`scheduler.step` in a loop, with the plan's gradients put into the network's outputs."""
    takes = inspect.signature(scheduler.step).parameters
    streams = generators(range(BATCH), "x")
    options = {"generator": streams} if "generator" in takes else {}
    options |= {"eta": eta} if "eta" in takes else {}
    cond = model.encode_prompts(PROMPTS)
    latents = model.init_latents(streams).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        active, w, gamma = (v[i].view(-1, 1, 1, 1).to(dtype) for v in (plan.active, plan.weight, plan.coupling))
        share = gamma / w  # of the gradient, what goes on to the latents
        output = guided(model, share * seen + (1 - share) * seen.detach(), t, cond, GUIDANCE)
        output = output.detach() + active * w * (output - output.detach())
        with InFloat64() if dtype == torch.float64 else nullcontext():
            latents = scheduler.step(output, t, latents, **options).prev_sample
    return latents, gradients_of(reward(latents), model)


def by_sweep(model, sampler, plan, dtype):
    init = model.init_latents
    model.init_latents = lambda streams: init(streams).to(dtype)
    latents = Rollout(model, sampler, GUIDANCE)(generators(range(BATCH), "x"), model.encode_prompts(PROMPTS), plan)
    model.init_latents = init
    return latents, gradients_of(reward(latents), model)


@pytest.fixture(scope="module")
def models(pipelines):
    return {dtype: make_model(pipelines["epsilon"], dtype) for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize(("name", "options", "calls"), DIFFUSION, ids=IDS)
@pytest.mark.parametrize("estimator", ["full", "truncated", "randomized", "leapalign"])
def test_the_gradient_is_that_of_plain_autograd(models, name, options, calls, estimator):
    eta = 0.7 if name in ("ddim", "TCD") and estimator != "full" else 0.0
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = models[dtype]
        arguments = model.scheduler, name, parse_options(options)
        sampler = build_sampler(model.scheduler, STEPS, eta, name, arguments[2])
        assert sampler.num_steps == calls
        plan = plan_for(estimator, sampler)
        scheduler = make_scheduler(*arguments)
        scheduler.set_timesteps(STEPS)
        expected_latents, expected = by_autograd(model, scheduler, plan, eta, dtype)
        latents, ours = by_sweep(model, sampler, plan, dtype)
        assert expected.norm() > 0
        assert relative_difference(latents, expected_latents) <= near
        assert relative_difference(ours, expected) <= near
