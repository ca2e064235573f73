"""Turns the configuration that a user wrote into the one that runs: checks it and derives the missing values."""

import difflib
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alignprop.settings.combinations import check_combinations, check_memory, check_multiple, check_truncation
from alignprop.settings.elsewhere import answer_for
from alignprop.settings.errors import ConfigError, one_of
from alignprop.settings.fields import DERIVED, FIELDS
from alignprop.settings.json_files import write_json
from alignprop.settings.memory_policies import NAMES, POLICIES, MemoryPolicy
from alignprop.settings.options import updates_of_epoch
from alignprop.settings.samplers import check_sampler
from alignprop.settings.sizes import picture_sizes, size_name


def resolve(config: ConfigDict, num_processes: int) -> ConfigDict:
    """Checks `config`, and returns a frozen copy with every derived value filled in.

    These values are derived here, after the overrides: `lora_alpha`, `train.num_inference_steps`,
    `train.sampler`, `train.sampler_options`, `trunc_backprop_timestep` and `truncated_backprop_minmax` (for DDIM, whose
    number of network calls is known) and the fields of `memory` if they are None,
    `train.gradient_accumulation_steps` (the micro-batches of one process per optimizer step), and
    `train.steps_per_epoch` (the optimizer steps of an epoch; with DDPO an epoch is one step). A value "auto" stays,
    and what follows from it is left out, because the run decides it (memory/planner.py).

    Args:
        num_processes: the number of processes that really run.

    Raises:
        ConfigError: a value or a combination of values cannot run.
    """
    c = ConfigDict(config.to_dict()).unlock()
    _check_fields(c)
    check_combinations(c)
    _derive(c)
    for group, prefix in ((c, ""), (c.train, "train.")):
        check_sampler(group.sampler, group.sampler_options, c.eta, f"{prefix}sampler")
    if c.train.sampler == "ddim":
        _derive_truncation(c, c.train.num_inference_steps)
        check_truncation(c, c.train.num_inference_steps)
    if c.memory_policy != "auto":
        _fill_memory(c, POLICIES[c.memory_policy])
    check_memory(c)
    if c.task == "train":
        _derive_batches(c, num_processes)
    if c.task == "explore" and num_processes > 1:
        raise ConfigError(f"task = 'explore' needs one process; there are {num_processes}")
    return c.lock()


def as_run(config: ConfigDict, num_processes: int, memory: MemoryPolicy, capacity: int) -> ConfigDict:
    """Returns the resolved `config` with the memory policy and the capacity that a run has chosen, to be saved."""
    content = config.to_dict() | {"memory": vars(memory), "per_gpu_capacity": capacity}
    if config.task == "train":
        micro_batches = config.train.total_batch_size // (capacity * num_processes)
        content["train"]["gradient_accumulation_steps"] = micro_batches
    return ConfigDict(content).lock()


def _derive(c: ConfigDict) -> None:
    """Fills in fields that are None and follow from other fields, and brings names into the form that code expects."""
    train = c.train
    if train.num_inference_steps is None:
        train.num_inference_steps = c.num_inference_steps
    if train.sampler_options is None:
        train.sampler_options = c.sampler_options if train.sampler in (None, c.sampler) else ""
    if train.sampler is None:
        train.sampler = c.sampler
    c.log_dir = os.path.expanduser(c.log_dir)
    for name in ("model", "config", "vae"):
        if c.pretrained[name]:
            c.pretrained[name] = os.path.expanduser(c.pretrained[name])
    if not isinstance(c.resolution, int | None):
        with c.ignore_type():  # it may be a sequence, which a run that continues would call a change
            c.resolution = ",".join(map(size_name, picture_sizes(c.resolution)))
    if c.lora_alpha is None:
        c.lora_alpha = float(c.lora_rank)
    # The command line may give "to_q,to_v" as one word.
    if c.lora_target_modules is not None:
        c.lora_target_modules = tuple(name for names in c.lora_target_modules for name in names.split(","))


def _derive_truncation(c: ConfigDict, steps: int) -> None:
    if c.trunc_backprop_timestep is None:
        c.trunc_backprop_timestep = steps - 1
    if c.truncated_backprop_minmax is None:
        c.truncated_backprop_minmax = (0, steps)


def _derive_batches(c: ConfigDict, num_processes: int) -> None:
    """Checks that batches are multiples of one another, and fills in the numbers of micro-batches and steps.

    `per_gpu_capacity` becomes the largest number up to its value that divides a process's share of an optimizer step.
    """
    train = c.train
    check_multiple("train.total_batch_size", train.total_batch_size, num_processes, f"{num_processes} processes")
    check_multiple(
        "train.total_samples_per_epoch", train.total_samples_per_epoch, train.total_batch_size,
        f"train.total_batch_size = {train.total_batch_size}",
    )  # fmt: skip
    if c.per_gpu_capacity != "auto":
        share = train.total_batch_size // num_processes
        c.per_gpu_capacity = next(n for n in range(min(c.per_gpu_capacity, share), 0, -1) if share % n == 0)
        train.gradient_accumulation_steps = share // c.per_gpu_capacity
    updates = c.num_epochs * updates_of_epoch(c)
    if train.lr_warmup_steps >= updates:
        raise ConfigError(
            f"train.lr_warmup_steps = {train.lr_warmup_steps} must be less than the number of optimizer updates of the "
            f"run, {updates}"
        )
    # A step of DDPO is a whole epoch, because it samples and then makes several updates with these samples.
    train.steps_per_epoch = updates_of_epoch(c) if c.algorithm == "align_prop" else 1


def _fill_memory(c: ConfigDict, policy: MemoryPolicy) -> None:
    for name in NAMES:
        if c.memory[name] is None:
            c.memory[name] = getattr(policy, name)


def check_name(field: str) -> None:
    """Raises a ConfigError with the nearest name if the configuration has no field of this name."""
    if field not in FIELDS and field not in DERIVED:
        near = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.75)  # below, only letters are alike
        hint = f"did you mean {near[0]!r}?" if near else "docs/config.md lists all fields"
        raise ConfigError(f"{field} is not a field of the configuration; {answer_for(field) or hint}")


def _check_fields(c: ConfigDict) -> None:
    flat = flatten(c.to_dict())
    for name in flat:
        check_name(name)
    for name, field in FIELDS.items():
        rule = field.rule
        if name not in flat:
            raise ConfigError(f"{name} is missing from the configuration; it must be {rule.wanted}")
        value = flat[name]
        if rule.choices and value is not None:
            one_of(name, value, rule.choices)
        elif not rule.accepts(value):
            raise ConfigError(f"{name} = {value!r} must be {rule.wanted}")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"learning_rate": 1}} -> {"train.learning_rate": 1}."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each field whose value differs, except for the place of a run, its start and its command."""
    before, now = flatten(before), flatten(now)
    aside = ("run_name", "log_dir", "resume_from", "command")
    shared = [name for name in now if name in before and name not in aside]
    return [f"{name}: {before[name]!r} → {now[name]!r}" for name in shared if before[name] != now[name]]


def save_config(config: ConfigDict, path: str | Path) -> None:
    """Writes the resolved configuration, and the versions of the packages that ran it, as JSON."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    write_json(path, {**config.to_dict(), "versions": {name: version(name) for name in packages}})
