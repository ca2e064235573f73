"""Turns a resolved configuration into the arguments of the parts of a run."""

from typing import Any

from ml_collections import ConfigDict

from alignprop.settings.memory_policies import MemoryPolicy


def estimator_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `estimators.build_estimator`. None stands for the default of the method."""
    first, minmax = config.trunc_backprop_timestep, config.truncated_backprop_minmax
    return {"first": first, "minmax": minmax, **config.plan.to_dict()}


def model_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `load_model` (models/loading.py), except for the precision."""
    c, source = config, config.pretrained
    return {
        "revision": source.revision,
        "variant": source.variant,
        "config": source.config,
        "vae": source.vae,
        "denoiser": source.denoiser,
        "without": components_left_out(c),
        "full": not c.use_lora,
        "resolution": c.resolution,
        "true_cfg_scale": c.true_cfg_scale,
        "negative_prompt": c.negative_prompt,
        "train_text_encoder": c.task == "train" and c.train_text_encoder,
    }


def chain_options(config: ConfigDict, training: bool) -> dict[str, Any]:
    """Returns the arguments of `chain_of` (method/samplers.py), for training or for an evaluation."""
    group, prefix = (config.train, "train.") if training else (config, "")
    alike = training and group.num_inference_steps == config.num_inference_steps
    return {
        "num_inference_steps": group.num_inference_steps,
        "eta": config.eta,
        "name": group.sampler,
        "options": group.sampler_options,
        "field": "num_inference_steps" if alike else f"{prefix}num_inference_steps",
        "sampler_field": f"{prefix}sampler",
    }


def rollout_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of a `Rollout` (method/rollout.py) that the configuration decides."""
    c = config
    return {
        "guidance_scale": c.guidance_scale,
        "guidance_interval": tuple(c.guidance_interval),
        "guidance_grad": c.guidance_grad,
        "adjoint_clip": c.adjoint_clip,
    }


def prefix_cache_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `build_prefix_cache` (method/prefix_cache.py)."""
    return {"interval": config.train.prefix_cache, "order": config.train.prefix_cache_order}


def gradient_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of a `RewardGradient` (method/gradient.py) that the configuration decides."""
    c = config
    return {
        "batch_size": c.train.total_batch_size,
        "loss": c.loss,
        "loss_target": c.loss_target,
        "loss_factor": c.train.loss_coeff * c.grad_scale,
        "reward_noise": c.reward_noise,
        "kl_coeff": c.kl_coeff,
        "trains_text_encoder": c.train_text_encoder,
    }


def updates_of_epoch(config: ConfigDict) -> int:
    """Returns the number of updates of the weights in an epoch. A step of DDPO is an epoch, and makes all of them."""
    batches = config.train.total_samples_per_epoch // config.train.total_batch_size
    return batches * config.ddpo.inner_epochs if config.algorithm == "ddpo" else batches


def components_left_out(config: ConfigDict) -> list[str]:
    """Returns the names in `pretrained.without`."""
    return [name.strip() for name in config.pretrained.without.split(",") if name.strip()]


def memory_policy(config: ConfigDict) -> MemoryPolicy:
    """Returns the memory policy that the fields of `memory` describe, for a configuration without "auto"."""
    return MemoryPolicy(**config.memory.to_dict())
