"""How far a fine-tuned model has moved from the base model, which it still is without its adapter."""

import torch

from alignprop.engine.sharding import is_sharded, release
from alignprop.lora.factors import has_lora
from alignprop.lora.scaling import without_lora
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, Model, Phases


def base_conditioning(model: Model, prompts: list[str], cond: Conditioning, phases: Phases) -> Conditioning:
    """What the base model makes of prompts of which the fine-tuned one has made `cond`.

    That is `cond` itself, unless a text encoder has an adapter, which is then brought to the device.
    """
    encoders = [encoder for encoder in model.lora_encoders.values() if has_lora(encoder)]
    if not encoders:
        return cond
    with phases("encode"), without_lora(*encoders):
        return model.encode_prompts(prompts)


def base_distance(
    rollout: Rollout, latents, cond: Conditioning, steps, noise, base_cond: Conditioning | None = None
) -> torch.Tensor:
    """Mean squared difference of the denoiser's output, with its adapter, to the base model's, [B].

    Both see x = α[i]·latents + σ[i]·noise, under the conditional branch alone. Two steps of a stochastic chain that
    differ in f only are Gaussians of one variance, and the KL divergence between them is b[i]²/(2·s[i]²)·‖f - f_base‖²:
    this, up to a factor of the step (DPOK, Fan et al. 2023, arXiv 2305.16381; the same weighting that Ho et al. 2020,
    arXiv 2006.11239, leave out of the loss). It has a meaning for a deterministic chain too.

    Differentiable in the adapter and in `cond` where gradients are enabled; the latents are taken for constants.

    Args:
        rollout: of the model and the chain.
        latents: final ones, float32 [B, ...].
        cond: of the B samples.
        steps: i of each sample, int [B].
        noise: standard normal, [B, ...].
        base_cond: what the base model has instead of `cond`; None: the same.
    """
    sampler, model, f = rollout.sampler, rollout.model, rollout.f
    shape = [-1] + [1] * (latents.dim() - 1)
    alpha, sigma = (level[steps].to(latents).view(shape) for level in (sampler.alpha, sampler.sigma))
    x = (alpha * latents + sigma * noise.to(latents)).detach()
    timesteps = sampler.timesteps[steps].to(latents.device)

    def output(cond: Conditioning) -> torch.Tensor:
        with f.autocast():
            return model.predict(x, timesteps, model.branches(cond, f.guidance_scale)[-1]).to(x.dtype)

    with torch.no_grad(), without_lora(rollout.denoiser):
        base = output(cond if base_cond is None else base_cond)
    return (output(cond) - base).square().flatten(1).mean(dim=1)


@torch.no_grad()
def chain_distance(
    rollout: Rollout, latents, cond: Conditioning, generators: list[torch.Generator], base_cond=None
) -> torch.Tensor:
    """`base_distance` on average over 4 steps in the middle of equal parts of the chain, [B].

    Args:
        generators: of the noise, one per sample.
        base_cond: as of `base_distance`.
    """
    steps = ((torch.arange(4) + 0.5) * rollout.sampler.num_steps / 4).long().unique()
    shape = (len(steps), *latents.shape[1:])
    noises = torch.stack([torch.randn(shape, generator=g) for g in generators], dim=1)
    samples = torch.ones(len(latents), dtype=torch.long)
    distances = []
    for i, noise in zip(steps, noises, strict=True):
        rollout.f.scale_lora(rollout.sampler.timesteps[i])  # before it is set to nothing and back
        distances.append(base_distance(rollout, latents, cond, i * samples, noise, base_cond))
    if is_sharded(rollout.denoiser):
        release(rollout.denoiser)
    return torch.stack(distances).mean(dim=0)
