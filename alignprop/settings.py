"""From the configuration that a person wrote to the one that runs: derive, check, warn."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict


class ConfigError(Exception):
    """A mistake in what the user asked for; its text is one line that says what is allowed.

    Not a ValueError, which absl would rewrap with our traceback when a preset raises it.
    """


def one_of(field: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is allowed; else a ConfigError that names the field and the nearest allowed value."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{field} = {value!r} is not one of {', '.join(map(repr, allowed))}{hint}")


def resolve(config: ConfigDict, num_processes: int) -> ConfigDict:
    """A frozen copy of `config` with every derived value filled in, checked.

    Derived here, after the overrides: `lora_alpha`, `trunc_backprop_timestep`, `truncated_backprop_minmax` where they
    are None, `train.gradient_accumulation_steps` (micro-batches of one process per optimizer step) and
    `train.steps_per_epoch` (optimizer steps).

    Args:
        num_processes: the number of processes that really run.

    Raises:
        ConfigError: a value or a combination that cannot run.
    """
    c = ConfigDict(config.to_dict()).unlock()
    _check_values(c)
    steps, train = c.num_inference_steps, c.train
    if c.lora_alpha is None:
        c.lora_alpha = float(c.lora_rank)
    # A command line gives "to_q,to_v" as one word.
    c.lora_target_modules = tuple(name for names in c.lora_target_modules for name in names.split(","))
    if c.trunc_backprop_timestep is None:
        c.trunc_backprop_timestep = steps - 1
    if c.truncated_backprop_minmax is None:
        c.truncated_backprop_minmax = (0, steps)
    _check_truncation(c)
    if c.task == "train":
        at_once = c.per_gpu_capacity * num_processes
        if train.total_batch_size % at_once:
            near = sorted({max(1, train.total_batch_size // at_once) * at_once,
                           (train.total_batch_size // at_once + 1) * at_once})  # fmt: skip
            raise ConfigError(
                f"train.total_batch_size = {train.total_batch_size} is not a multiple of per_gpu_capacity × processes "
                f"= {c.per_gpu_capacity} × {num_processes} = {at_once}; nearest: {' or '.join(map(str, near))}"
            )
        if train.total_samples_per_epoch % train.total_batch_size:
            raise ConfigError(
                f"train.total_samples_per_epoch = {train.total_samples_per_epoch} is not a multiple of "
                f"train.total_batch_size = {train.total_batch_size}"
            )
        train.gradient_accumulation_steps = train.total_batch_size // at_once
        train.steps_per_epoch = train.total_samples_per_epoch // train.total_batch_size
    return c.lock()


_POSITIVE = (
    "num_epochs", "per_gpu_capacity", "num_inference_steps", "lora_rank", "save_freq", "num_eval_images",
    "max_vis_images", "train.total_batch_size", "train.total_samples_per_epoch", "train.learning_rate",
    "train.max_grad_norm", "train.max_skipped_steps", "train.loss_coeff", "grad_scale", "train.adam_epsilon",
)  # fmt: skip
_NOT_NEGATIVE = (
    "eval_freq", "num_checkpoint_limit", "eta", "adjoint_clip", "train.adam_weight_decay",
)  # fmt: skip


def _check_values(c: ConfigDict) -> None:
    one_of("task", c.task, ("train", "evaluate", "evaluate_soup"))
    one_of("mixed_precision", c.mixed_precision, ("no", "fp16", "bf16"))
    one_of("loss", c.loss, ("maximise", "target", "ceiling"))
    flat = flatten(c.to_dict())
    for field in _POSITIVE:
        if not flat[field] > 0:
            raise ConfigError(f"{field} = {flat[field]} must be greater than 0")
    for field in _NOT_NEGATIVE:
        if not flat[field] >= 0:
            raise ConfigError(f"{field} = {flat[field]} must not be negative")
    if c.guidance_scale < 1:
        raise ConfigError(f"guidance_scale = {c.guidance_scale} must be at least 1 (1 is no guidance)")
    if c.eta > 1:
        raise ConfigError(f"eta = {c.eta} must be from 0 (deterministic) to 1 (ancestral)")
    for field in ("train.ema_decay", "train.adam_beta1", "train.adam_beta2"):
        if not 0 <= flat[field] < 1:
            raise ConfigError(f"{field} = {flat[field]} must be at least 0 and less than 1")
    if c.lora_alpha is not None and c.lora_alpha <= 0:
        raise ConfigError(f"lora_alpha = {c.lora_alpha} must be greater than 0")
    if c.loss != "maximise" and c.loss_target is None:
        raise ConfigError(f"loss = {c.loss!r} needs loss_target, in units of the reward")
    if c.task == "evaluate_soup":
        one_of("soup_mode", c.soup_mode, ("delta", "factors"))
        if not c.resume_from:
            raise ConfigError("resume_from is empty; evaluate_soup needs the checkpoint that mixing_coef_1 multiplies")
        outside = [x for x in c.mixing_coef_1 if not 0 <= float(x) <= 1]
        if outside or not c.mixing_coef_1:
            raise ConfigError(f"mixing_coef_1 = {tuple(c.mixing_coef_1)}: each coefficient must be from 0 to 1")


def _check_truncation(c: ConfigDict) -> None:
    steps, first, minmax = c.num_inference_steps, c.trunc_backprop_timestep, tuple(c.truncated_backprop_minmax)
    if not 0 <= first < steps:
        raise ConfigError(f"trunc_backprop_timestep = {first} must be from 0 to num_inference_steps - 1 = {steps - 1}")
    if len(minmax) != 2 or not 0 <= minmax[0] < minmax[1] <= steps:
        raise ConfigError(
            f"truncated_backprop_minmax = {minmax} must be (low, high) with 0 <= low < high <= "
            f"num_inference_steps = {steps}"
        )


# field: does it do anything in this configuration, and what it needs
_HAS_EFFECT = {
    "trunc_backprop_timestep": (lambda c: c.estimator == "truncated", "estimator = 'truncated'"),
    "truncated_backprop_minmax": (
        lambda c: c.estimator in ("randomized", "per_step"), "estimator = 'randomized' or 'per_step'"),
    "loss_target": (lambda c: c.loss != "maximise", "loss = 'target' or 'ceiling'"),
    "lora_rank": (lambda c: c.use_lora, "use_lora = True"),
    "lora_alpha": (lambda c: c.use_lora, "use_lora = True"),
    "lora_target_modules": (lambda c: c.use_lora, "use_lora = True"),
    "pretrained.config": (
        lambda c: c.pretrained.model.endswith((".safetensors", ".ckpt")), "a single file as pretrained.model"),
    "pretrained.revision": (lambda c: not Path(c.pretrained.model).exists(), "a hub name as pretrained.model"),
    "resume_from_2": (lambda c: c.task == "evaluate_soup", "task = 'evaluate_soup'"),
    "mixing_coef_1": (lambda c: c.task == "evaluate_soup", "task = 'evaluate_soup'"),
    "soup_mode": (lambda c: c.task == "evaluate_soup", "task = 'evaluate_soup'"),
}  # fmt: skip
_TRAINING_ONLY = (
    "num_epochs", "save_freq", "num_checkpoint_limit", "eval_freq", "prompt_fn", "estimator", "adjoint_clip", "loss",
    "loss_target", "grad_scale", "log_with", "use_lora", "lora_rank", "lora_alpha", "lora_target_modules",
    "grad_checkpoint", "trunc_backprop_timestep", "truncated_backprop_minmax",
)  # fmt: skip


def warnings_for(config: ConfigDict, overridden: Iterable[str]) -> list[str]:
    """One line for each field that a person set and that has no effect in this configuration."""
    lines = []
    for field in overridden:
        works, needs = _HAS_EFFECT.get(field, (lambda c: True, ""))
        if config.task != "train" and (field in _TRAINING_ONLY or field.startswith("train.")):
            lines.append(f"{field} has no effect: task = {config.task!r} does not train")
        elif not works(config):
            lines.append(f"{field} has no effect: it needs {needs}")
    return lines


def flatten(config: dict, prefix: str = "") -> dict:
    """{"train": {"learning_rate": 1}} -> {"train.learning_rate": 1}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def changes(before: dict, now: dict) -> list[str]:
    """One line for each field that two (nested) configurations have with different values; where a run lies aside."""
    before, now = flatten(before), flatten(now)
    aside = ("run_name", "log_dir", "resume_from")
    shared = [name for name in now if name in before and name not in aside]
    return [f"{name}: {before[name]!r} → {now[name]!r}" for name in shared if before[name] != now[name]]


def save_config(config: ConfigDict, path) -> None:
    """Writes the resolved configuration and the versions of what ran it, as JSON."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    content = {**config.to_dict(), "versions": {name: version(name) for name in packages}}
    Path(path).write_text(json.dumps(content, indent=2) + "\n")
