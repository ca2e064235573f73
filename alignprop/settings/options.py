"""What the parts of a run take of a resolved configuration, by the names of their own arguments."""

from ml_collections import ConfigDict

from alignprop.settings.memory_policies import MemoryPolicy


def estimator_options(config: ConfigDict) -> dict:
    """What `estimators.build_estimator` takes, by its names; None where the method's own value is to be used."""
    first, minmax = config.trunc_backprop_timestep, config.truncated_backprop_minmax
    return {"first": first, "minmax": minmax, **config.plan.to_dict()}


def model_options(config: ConfigDict) -> dict:
    """What `load_model` takes of the configuration (models/loading.py), by its names, but for the precision."""
    c, source = config, config.pretrained
    return {
        "revision": source.revision,
        "variant": source.variant,
        "config": source.config,
        "vae": source.vae,
        "without": components_left_out(c),
        "full": not c.use_lora,
        "resolution": c.resolution,
        "true_cfg_scale": c.true_cfg_scale,
        "train_text_encoder": c.task == "train" and c.train_text_encoder,
    }


def rollout_options(config: ConfigDict) -> dict:
    """What a `Rollout` takes of the configuration (method/rollout.py), by its names."""
    c = config
    return {"guidance_scale": c.guidance_scale, "guidance_grad": c.guidance_grad, "adjoint_clip": c.adjoint_clip}


def gradient_options(config: ConfigDict) -> dict:
    """What a `RewardGradient` takes of the configuration (method/gradient.py), by its names."""
    c = config
    return {
        "batch_size": c.train.total_batch_size,
        "loss": c.loss,
        "loss_target": c.loss_target,
        "loss_scale": c.train.loss_coeff * c.grad_scale,
        "reward_noise": c.reward_noise,
        "kl_coeff": c.kl_coeff,
        "trains_text_encoder": c.train_text_encoder,
    }


def components_left_out(config: ConfigDict) -> list[str]:
    """The names in `pretrained.without`."""
    return [name.strip() for name in config.pretrained.without.split(",") if name.strip()]


def memory_policy(config: ConfigDict) -> MemoryPolicy:
    """What `memory` says, in a configuration without "auto"."""
    return MemoryPolicy(**config.memory.to_dict())
