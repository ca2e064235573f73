"""The distance of a fine-tuned model from its base model, which is the same model without its adapter."""

import torch

from alignprop.engine.sharding import is_sharded, release
from alignprop.lora.factors import has_lora
from alignprop.lora.scaling import without_lora
from alignprop.method.chain import per_sample
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, Model, Phases


def base_conditioning(model: Model, prompts: list[str], cond: Conditioning, phases: Phases) -> Conditioning:
    """Returns the base model's conditioning for the prompts.

    This is `cond`, the fine-tuned model's conditioning, unless a text encoder has an adapter. If one has, the text
    encoders are brought to the device, and encode the prompts without their adapters.
    """
    encoders = [encoder for encoder in model.lora_encoders.values() if has_lora(encoder)]
    if not encoders:
        return cond
    with phases("encode"), without_lora(*encoders):
        return model.encode_prompts(prompts)


def base_distance(
    rollout: Rollout, latents, cond: Conditioning, steps, noise, base_cond: Conditioning | None = None
) -> torch.Tensor:
    """Returns the mean squared difference of the denoiser's output from the base model's output, [B].

    Both networks see scale[i]·(α[i]·latents + σ[i]·noise), and only the conditional branch counts. Two steps of a
    stochastic one-step method that differ in f only are Gaussians with the same variance. The KL divergence between
    them is b[i,i]²/(2·s[i,i]²)·‖f - f_base‖² (DPOK, Fan et al. 2023, arXiv 2305.16381). Without guidance, the base
    distance is this divergence up to a factor that depends on the step, at re-noised final latents instead of the
    chain's own. Ho et al. 2020 (arXiv 2006.11239) leave this weighting of the steps out of their loss too. The base
    distance also has a meaning for a deterministic chain.

    If gradients are enabled, the result is differentiable with respect to the adapter and `cond`. The latents count as
    constants.

    Args:
        rollout: gives the model and the chain.
        latents: the final latents, float32 [B, ...].
        cond: the conditioning of the B samples.
        steps: the step i of each sample, int [B].
        noise: standard normal noise, [B, ...].
        base_cond: the base model's conditioning. None means that it is `cond` too.
    """
    sampler, model, f = rollout.sampler, rollout.model, rollout.f
    levels = (sampler.alpha[:-1], sampler.sigma[:-1])
    alpha, sigma = (per_sample((sampler.scale * level)[steps].to(latents), latents) for level in levels)
    x = (alpha * latents + sigma * noise.to(latents)).detach()  # as the network sees x[i]
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
    """Returns the mean of `base_distance` over the middle steps of 4 equal parts of the chain, [B].

    Args:
        rollout: gives the model and the chain.
        latents: the final latents, float32 [B, ...].
        cond: the conditioning of the B samples.
        generators: one for each sample, for the noise.
        base_cond: see `base_distance`.
    """
    steps = ((torch.arange(4) + 0.5) * rollout.sampler.num_steps / 4).long().unique()
    shape = (len(steps), *latents.shape[1:])
    noises = torch.stack([torch.randn(shape, generator=g) for g in generators], dim=1)
    samples = torch.ones(len(latents), dtype=torch.long)
    distances = []
    for i, noise in zip(steps, noises, strict=True):
        # The scale is set first, because `base_distance` sets it to 0 and then back to the value that it had before.
        rollout.f.scale_lora(rollout.sampler.timesteps[i])
        distances.append(base_distance(rollout, latents, cond, i * samples, noise, base_cond))
    if is_sharded(rollout.denoiser):
        release(rollout.denoiser)
    return torch.stack(distances).mean(dim=0)
