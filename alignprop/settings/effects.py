"""Which fields of a configuration have an effect together with the others: none is to be set in vain."""

import os
from collections.abc import Iterable

from ml_collections import ConfigDict

# estimators that have each field of `plan`
PLAN_FIELDS = {
    "num_active": ("drtune", "sparse", "bridge", "lagrange"),
    "exit_window": ("refl", "drtune"),
    "copies": ("draft_lv",),
    "late_bias": ("sparse", "bridge"),
    "rescale": ("sparse", "bridge"),
    "coupling": ("bridge", "lagrange", "leapalign"),
    "order": ("lagrange",),
    "support_scale": ("lagrange",),
}


def _needs_estimator(*names: str):
    return lambda c: c.estimator in names, "estimator = " + " or ".join(map(repr, names))


# field: does it do anything in this configuration, and what it needs
_HAS_EFFECT = {
    "trunc_backprop_timestep": _needs_estimator("truncated"),
    "truncated_backprop_minmax": _needs_estimator("randomized", "per_step"),
    **{f"plan.{field}": _needs_estimator(*names) for field, names in PLAN_FIELDS.items()},
    "loss_target": (lambda c: c.loss != "maximise", "loss = 'target' or 'ceiling'"),
    "lora_rank": (lambda c: c.use_lora, "use_lora = True"),
    "lora_alpha": (lambda c: c.use_lora, "use_lora = True"),
    "lora_target_modules": (lambda c: c.use_lora, "use_lora = True"),
    "pretrained.config": (
        lambda c: c.pretrained.model.endswith((".safetensors", ".ckpt")), "a single file as pretrained.model"),
    "pretrained.without": (
        lambda c: not c.pretrained.model.endswith((".safetensors", ".ckpt")), "a pipeline as pretrained.model"),
    "pretrained.revision": (lambda c: not os.path.exists(c.pretrained.model), "a hub name as pretrained.model"),
    "guidance_grad": (lambda c: c.guidance_scale != 1, "guidance_scale > 1"),
    "memory.guidance_batching": (lambda c: c.guidance_scale != 1, "guidance_scale > 1"),
    "resume_from_2": (lambda c: c.task == "evaluate_soup", "task = 'evaluate_soup'"),
    "mixing_coef_1": (lambda c: c.task == "evaluate_soup", "task = 'evaluate_soup'"),
    "soup_mode": (lambda c: c.task == "evaluate_soup", "task = 'evaluate_soup'"),
    "allow_extrapolation": (lambda c: c.task == "evaluate_soup", "task = 'evaluate_soup'"),
    "reward_combine": (lambda c: "," in c.reward_fn, "several rewards in reward_fn"),
    "eval_base_distance": (lambda c: c.use_lora, "use_lora = True"),
    "lora_scale": (lambda c: bool(c.resume_from), "resume_from"),
    "lora_schedule": (lambda c: bool(c.resume_from), "resume_from"),
    "hub.private": (lambda c: bool(c.hub.repo), "hub.repo"),
    "ddpo.per_prompt_min_count": (
        lambda c: c.ddpo.per_prompt_buffer >= c.ddpo.per_prompt_min_count,
        "ddpo.per_prompt_buffer of at least as many"),
    "train.adam_beta1": (lambda c: c.train.optimizer == "adamw", "train.optimizer = 'adamw'"),
    "train.adam_beta2": (lambda c: c.train.optimizer == "adamw", "train.optimizer = 'adamw'"),
    "train.adam_epsilon": (lambda c: c.train.optimizer == "adamw", "train.optimizer = 'adamw'"),
}  # fmt: skip
_TRAINING_ONLY = (
    "num_epochs", "save_freq", "num_checkpoint_limit", "eval_freq", "prompt_fn", "estimator", "adjoint_clip", "loss",
    "loss_target", "grad_scale", "log_with", "use_lora", "train_text_encoder", "lora_rank", "lora_alpha",
    "lora_target_modules", "trunc_backprop_timestep", "truncated_backprop_minmax", "guidance_grad", "memory.keep_steps",
    "memory.block_checkpointing", "memory.decoder_checkpointing", "algorithm", "reward_noise", "kl_coeff", "stop_when",
    "best_by", "hub.repo", "hub.private", *(f"plan.{field}" for field in PLAN_FIELDS),
)  # fmt: skip
_ALIGN_PROP_ONLY = (
    "estimator", "adjoint_clip", "loss", "loss_target", "grad_scale", "trunc_backprop_timestep",
    "truncated_backprop_minmax", "reward_noise", "kl_coeff", "memory.keep_steps", "memory.decoder_checkpointing",
    "train.loss_coeff", *(f"plan.{field}" for field in PLAN_FIELDS),
)  # fmt: skip
# Options of one reward, or of several whose names begin with it; `clip` also measures diversity.
_REWARD_OPTIONS = ("aesthetic", "hps", "pickscore", "imagereward", "siglip", "count", "colour", "jpeg")
_AFTER_TRAINING = ("lora_scale", "lora_schedule")
_OF_GRADIENTS = ("guidance_grad", "memory.block_checkpointing", "memory.decoder_checkpointing")


def warnings_for(config: ConfigDict, overridden: Iterable[str]) -> list[str]:
    """One line for each field that a person set and that has no effect in this configuration."""
    lines = []
    for field in overridden:
        works, needs = _HAS_EFFECT.get(field, (lambda c: True, ""))
        guides = config.task == "guide" and field in _OF_GRADIENTS
        if config.task != "train" and not guides and (field in _TRAINING_ONLY or field.startswith("train.")):
            lines.append(f"{field} has no effect: task = {config.task!r} does not train")
        elif config.task in ("train", "evaluate_soup") and field in _AFTER_TRAINING:
            lines.append(f"{field} has no effect: it needs task = 'evaluate' or 'guide'")
        elif field.startswith("guide.") and config.task != "guide":
            lines.append(f"{field} has no effect: it needs task = 'guide'")
        elif field.startswith("ddpo.") and config.algorithm != "ddpo":
            lines.append(f"{field} has no effect: it needs algorithm = 'ddpo'")
        elif config.task == "train" and config.algorithm == "ddpo" and field in _ALIGN_PROP_ONLY:
            lines.append(f"{field} has no effect: algorithm = 'ddpo' does not use it")
        elif field.startswith(tuple(f"{name}." for name in _REWARD_OPTIONS)) and not _is_named(config, field):
            lines.append(f"{field} has no effect: it needs that reward in reward_fn or eval_reward_fn")
        elif not works(config):
            lines.append(f"{field} has no effect: it needs {needs}")
    return lines


def _is_named(config: ConfigDict, field: str) -> bool:
    """Whether a reward is named that has this option."""
    rewards = f"{config.reward_fn},{config.eval_reward_fn}".split(",")
    return any(reward.strip().startswith(field.partition(".")[0]) for reward in rewards)
