"""Schedulers of diffusers, and plain autograd through their steps, which the sweep is compared with.

python -m tests.helpers.schedulers FOLDER      prints a table of all of them; FOLDER holds a Stable Diffusion
"""

import inspect
import sys
from contextlib import nullcontext

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from torch.overrides import TorchFunctionMode

from alignprop.engine.seeding import generator, generators
from alignprop.lora.factors import add_lora, trainable_parameters
from alignprop.method import estimators
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.method.schedulers import make_scheduler
from alignprop.models.sd import StableDiffusion
from alignprop.settings.samplers import parse_options, scheduler_class

STEPS, BATCH, GUIDANCE = 5, 2, 1.5
PROMPTS = ["a cat", "two dogs"]
SMALL = 0.3  # of the LoRA, where the rounding of float32 is compared and must not be amplified much

# name, options, network calls for 5 steps
DIFFUSION = [
    ("ddim", "", 5),
    ("DDPM", "", 5),
    ("EulerDiscrete", "", 5),
    ("EulerDiscrete", "use_karras_sigmas=True, timestep_spacing=trailing", 5),
    ("EulerDiscrete", "use_exponential_sigmas=True", 5),
    ("EulerDiscrete", "use_beta_sigmas=True", 5),
    ("EulerAncestralDiscrete", "", 5),
    ("HeunDiscrete", "", 9),
    ("LMSDiscrete", "", 5),
    ("PNDM", "skip_prk_steps=True", 6),
    ("PNDM", "skip_prk_steps=False", 14),
    ("DPMSolverMultistep", "", 5),
    ("DPMSolverMultistep", "use_karras_sigmas=True, solver_order=3", 5),
    ("DPMSolverMultistep", "algorithm_type=sde-dpmsolver++", 5),
    ("DPMSolverMultistep", "algorithm_type=dpmsolver, final_sigmas_type=sigma_min", 5),
    ("DPMSolverSinglestep", "", 5),
    ("DPMSolverSinglestep", "solver_order=3", 5),
    ("DPMSolverSinglestep", "algorithm_type=sde-dpmsolver++", 5),
    ("KDPM2Discrete", "", 9),
    ("KDPM2AncestralDiscrete", "", 9),
    ("UniPCMultistep", "", 5),
    ("UniPCMultistep", "solver_order=3", 5),
    ("DEISMultistep", "", 5),
    ("LCM", "", 5),
    ("TCD", "", 5),
    ("SASolver", "", 5),
]
FLOW = [
    ("ddim", "", 5),
    ("FlowMatchHeunDiscrete", "", 9),
    ("FlowMatchLCM", "", 5),
    ("DPMSolverMultistep", "", 5),
    ("DPMSolverMultistep", "algorithm_type=sde-dpmsolver++", 5),
    ("DPMSolverSinglestep", "", 5),
    ("UniPCMultistep", "", 5),
    ("SASolver", "", 5),
]
KINDS = [("diffusion", *row) for row in DIFFUSION] + [("flow", *row) for row in FLOW]
ESTIMATORS = ("full", "truncated", "randomized", "leapalign")


class InFloat64(TorchFunctionMode):
    """Keeps a scheduler's step in float64, on float32 noise, as a rollout draws it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.randn:
            return function(*args, **{**kwargs, "dtype": torch.float32}).double()
        if function is torch.Tensor.to and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **kwargs)


def make_model(folder, dtype, size=0.5):
    """A model whose LoRA has random weights, because a fresh LoRA has B = 0 and gives A no gradient to compare."""
    model = StableDiffusion.load(str(folder), dtype=dtype)
    add_lora(model.denoiser, rank=2, alpha=2, target_modules=["to_q", "to_v", "to_out.0"], seed=0)
    for name, parameter in trainable_parameters(model.denoiser).items():
        parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data.normal_(0, size, generator=generator(name))
    return model


def scheduler_of(kind, own):
    """The scheduler of the model itself, or of a flow-matching model, for which it counts in the comparisons."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0) if kind == "flow" else own


def eta_of(name):
    return 0.7 if name in ("ddim", "TCD") else 0.0


def plan_for(estimator, sampler):
    build = estimators.build_estimator(estimator, first=sampler.num_steps - 2)
    return build(sampler, BATCH, generator("plan", estimator))


def reward(latents):
    """Any smooth function of x[N] whose gradient differs between samples and pixels."""
    weights = torch.randn(latents.shape, generator=generator("reward"), dtype=latents.dtype)
    return (weights * latents.sin()).sum()


def gradients_of(value, model):
    parameters = list(trainable_parameters(model.denoiser).values())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def guided(model, latents, t, cond, guidance_scale):
    """Classifier-free guidance as the pipeline writes it, in one call of twice the batch."""
    if guidance_scale == 1:
        return model.predict(latents, t, {"prompt_embeds": cond["prompt_embeds"]})
    both = {"prompt_embeds": torch.cat([cond["negative_prompt_embeds"], cond["prompt_embeds"]])}
    unconditional, conditional = model.predict(torch.cat([latents, latents]), t, both).chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def by_autograd(model, scheduler, plan, eta, dtype, scales=None):
    """`scheduler.step` in a loop, with the plan's gradients put into the network's outputs.

    Args:
        scales: the guidance scale of each step; None means GUIDANCE for all.
    """
    takes = inspect.signature(scheduler.step).parameters
    streams = generators(range(BATCH), "x")
    options = {"generator": streams} if "generator" in takes else {}
    options |= {"eta": eta} if "eta" in takes else {}
    cond = model.encode_prompts(PROMPTS)
    latents = model.init_latents(streams).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        active, w, gamma = (v[i].view(-1, 1, 1, 1).to(dtype) for v in (plan.active, plan.weight, plan.coupling))
        share = gamma / w  # of the output's gradient, what goes on to the latents
        output = guided(model, share * seen + (1 - share) * seen.detach(), t, cond, scales[i] if scales else GUIDANCE)
        output = output.detach() + active * w * (output - output.detach())
        with InFloat64() if dtype == torch.float64 else nullcontext():
            latents = scheduler.step(output, t, latents, **options).prev_sample
    return latents, gradients_of(reward(latents), model)


def by_sweep(model, sampler, plan, dtype, **options):
    init = model.init_latents
    model.init_latents = lambda streams: init(streams).to(dtype)
    try:
        rollout = Rollout(model, sampler, GUIDANCE, **options)
        latents = rollout(generators(range(BATCH), "x"), model.encode_prompts(PROMPTS), plan)
    finally:
        del model.init_latents
    return latents, gradients_of(reward(latents), model)


def difference(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


def differences(model, kind, name, options, estimator, dtype):
    """Returns the number of calls, and the relative differences of the latents and of the LoRA's gradient."""
    own = scheduler_of(kind, model.scheduler)
    eta = eta_of(name) if kind == "diffusion" else 0.0  # a flow's noise is ours, not its scheduler's
    sampler = build_sampler(own, STEPS, eta, name, options)
    plan = plan_for(estimator, sampler)
    scheduler = make_scheduler(own, name, parse_options(options))
    scheduler.set_timesteps(STEPS)
    expected_latents, expected = by_autograd(model, scheduler, plan, eta, dtype)
    latents, ours = by_sweep(model, sampler, plan, dtype)
    assert expected.norm() > 0
    return sampler.num_steps, difference(latents, expected_latents), difference(ours, expected)


def from_pipeline(folder, model, name, options):
    """Returns the relative difference of the rollout's latents from those of the pipeline with this scheduler.

    The pipeline gets its scheduler as docs/samplers.md says.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    own, pipeline.unet = pipeline.scheduler, model.denoiser
    cls = DDIMScheduler if name == "ddim" else scheduler_class(name)
    pipeline.scheduler = cls.from_config(own.config, **parse_options(options))
    expected = pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, eta=eta_of(name), output_type="latent",
        generator=generators(range(BATCH), "x"),
    ).images  # fmt: skip
    sampler = build_sampler(own, STEPS, eta_of(name), name, options)
    ours = Rollout(model, sampler, GUIDANCE)(generators(range(BATCH), "x"), model.encode_prompts(PROMPTS), None)
    return difference(ours, expected)


def main(folder):
    models = {dtype: make_model(folder, dtype, SMALL) for dtype in (torch.float64, torch.float32)}
    print("| kind | sampler | options | calls | pipeline | " + " | ".join(f"{e} 64/32" for e in ESTIMATORS) + " |")
    print("|---" * (5 + len(ESTIMATORS)) + "|")
    for kind, name, options, calls in KINDS:
        pictures = f"{from_pipeline(folder, models[torch.float32], name, options):.0e}" if kind == "diffusion" else "–"
        cells = []
        for estimator in ESTIMATORS:
            if name == "PNDM" and "False" in options and estimator == "leapalign":  # steps that do not add up
                cells.append("refused")
                continue
            found = [differences(model, kind, name, options, estimator, dtype)[2] for dtype, model in models.items()]
            cells.append("/".join(f"{value:.0e}" for value in found))
        print(f"| {kind} | {name} | {options} | {calls} | {pictures} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
