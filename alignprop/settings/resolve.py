"""From the configuration that a person wrote to the one that runs: derive, check, warn."""

import difflib
import os

from ml_collections import ConfigDict

from alignprop.settings.elsewhere import answer_for
from alignprop.settings.errors import ConfigError, one_of
from alignprop.settings.fields import DERIVED, FIELDS
from alignprop.settings.json_files import write_json
from alignprop.settings.memory_policies import NAMES, POLICIES, MemoryPolicy


def resolve(config: ConfigDict, num_processes: int) -> ConfigDict:
    """A frozen copy of `config` with every derived value filled in, checked.

    Derived here, after the overrides: `lora_alpha`, `train.num_inference_steps`, `trunc_backprop_timestep`,
    `truncated_backprop_minmax` and the fields of `memory` where they are None, `train.gradient_accumulation_steps`
    (micro-batches of one process per optimizer step) and `train.steps_per_epoch` (optimizer steps). What is "auto"
    stays so, and what follows from it is left out: the run decides that (memory/planner.py).

    Args:
        num_processes: the number of processes that really run.

    Raises:
        ConfigError: a value or a combination that cannot run.
    """
    c = ConfigDict(config.to_dict()).unlock()
    _check_fields(c)
    _check_combinations(c)
    _derive(c)
    _check_truncation(c)
    if c.memory_policy != "auto":
        _fill_memory(c, POLICIES[c.memory_policy])
    _check_memory(c)
    if c.task == "train":
        _derive_batches(c, num_processes)
    if c.task == "explore" and num_processes > 1:
        raise ConfigError(f"task = 'explore' needs one process; there are {num_processes}")
    return c.lock()


def as_run(config: ConfigDict, num_processes: int, memory: MemoryPolicy, capacity: int) -> ConfigDict:
    """What `config`, resolved, came to in a run, to be written down: with the memory policy and capacity chosen."""
    content = config.to_dict() | {"memory": vars(memory), "per_gpu_capacity": capacity}
    if config.task == "train":
        micro_batches = config.train.total_batch_size // (capacity * num_processes)
        content["train"]["gradient_accumulation_steps"] = micro_batches
    return ConfigDict(content).lock()


def _derive(c: ConfigDict) -> None:
    """Fills in what follows from other fields where it is None, and makes names what code expects."""
    train = c.train
    if train.num_inference_steps is None:
        train.num_inference_steps = c.num_inference_steps
    c.log_dir = os.path.expanduser(c.log_dir)
    for name in ("model", "config", "vae"):
        if c.pretrained[name]:
            c.pretrained[name] = os.path.expanduser(c.pretrained[name])
    if c.lora_alpha is None:
        c.lora_alpha = float(c.lora_rank)
    # A command line gives "to_q,to_v" as one word.
    if c.lora_target_modules is not None:
        c.lora_target_modules = tuple(name for names in c.lora_target_modules for name in names.split(","))
    if c.trunc_backprop_timestep is None:
        c.trunc_backprop_timestep = train.num_inference_steps - 1
    if c.truncated_backprop_minmax is None:
        c.truncated_backprop_minmax = (0, train.num_inference_steps)


def _derive_batches(c: ConfigDict, num_processes: int) -> None:
    """Checks that batches divide each other, and fills in how many of one make another.

    `per_gpu_capacity` becomes the largest micro-batch up to it that divides a process's share of a step.
    """
    train = c.train
    _check_multiple("train.total_batch_size", train.total_batch_size, num_processes, f"{num_processes} processes")
    _check_multiple(
        "train.total_samples_per_epoch", train.total_samples_per_epoch, train.total_batch_size,
        f"train.total_batch_size = {train.total_batch_size}",
    )  # fmt: skip
    if c.per_gpu_capacity != "auto":
        share = train.total_batch_size // num_processes
        c.per_gpu_capacity = next(n for n in range(min(c.per_gpu_capacity, share), 0, -1) if share % n == 0)
        train.gradient_accumulation_steps = share // c.per_gpu_capacity
    # A step of DDPO is a whole epoch: it samples, and then makes several updates with these samples.
    updates = train.total_samples_per_epoch // train.total_batch_size
    train.steps_per_epoch = updates if c.algorithm == "align_prop" else 1


def _fill_memory(c: ConfigDict, policy: MemoryPolicy) -> None:
    for name in NAMES:
        if c.memory[name] is None:
            c.memory[name] = getattr(policy, name)


def check_name(field: str) -> None:
    """Raises: ConfigError with the nearest name, if the configuration has no such field."""
    if field not in FIELDS and field not in DERIVED:
        near = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.75)  # less is a likeness of letters only
        hint = f"did you mean {near[0]!r}?" if near else "docs/config.md has them all"
        raise ConfigError(f"{field} is not a field of the configuration; {answer_for(field) or hint}")


def _check_fields(c: ConfigDict) -> None:
    flat = flatten(c.to_dict())
    for field in flat:
        check_name(field)
    for name, field in FIELDS.items():
        rule = field.rule
        if name not in flat:
            raise ConfigError(f"{name} is missing from the configuration; it must be {rule.wanted}")
        value = flat[name]
        if rule.choices and value is not None:
            one_of(name, value, rule.choices)
        elif not rule.accepts(value):
            raise ConfigError(f"{name} = {value!r} must be {rule.wanted}")


def _check_combinations(c: ConfigDict) -> None:
    if c.kl_coeff and not c.use_lora:
        raise ConfigError(f"kl_coeff = {c.kl_coeff} needs use_lora = True: without its adapter the model is the base")
    if c.train_text_encoder and not c.use_lora:
        raise ConfigError("train_text_encoder = True needs use_lora = True: a text encoder is trained by a LoRA only")
    if c.train_text_encoder and c.algorithm == "ddpo":
        raise ConfigError("train_text_encoder = True needs algorithm = 'align_prop': DDPO trains the denoiser alone")
    if c.guide.window[0] >= c.guide.window[1]:
        raise ConfigError(f"guide.window = {tuple(c.guide.window)} must be (from, to) with from < to")
    if c.task == "train" and c.algorithm == "ddpo" and not c.eta:
        raise ConfigError("eta = 0 must be greater than 0 where algorithm = 'ddpo': a policy needs chance; it has 1.0")
    if c.task == "train" and c.algorithm == "ddpo" and c.train.total_samples_per_epoch == 1:
        raise ConfigError(
            "train.total_samples_per_epoch = 1 must be at least 2 where algorithm = 'ddpo', which compares a sample "
            "with others"
        )
    if c.loss != "maximise" and c.loss_target is None:
        raise ConfigError(f"loss = {c.loss!r} needs loss_target, in units of the reward")
    if c.task == "evaluate_soup":
        if not c.resume_from:
            raise ConfigError("resume_from is empty; evaluate_soup needs the checkpoint that mixing_coef_1 multiplies")
        if not c.allow_extrapolation and not all(0 <= x <= 1 for x in c.mixing_coef_1):
            raise ConfigError(
                f"mixing_coef_1 = {tuple(c.mixing_coef_1)}: each coefficient must be from 0 to 1, unless "
                "allow_extrapolation = True"
            )


def _check_memory(c: ConfigDict) -> None:
    memory = c.memory
    if memory.residency != "phase":
        return
    if memory.keep_steps:
        raise ConfigError(
            f"memory.keep_steps = {memory.keep_steps} must be 0 where memory.residency = 'phase': kept graphs would "
            "hold the weights that leave the device"
        )
    if not c.use_lora and c.task == "train":
        raise ConfigError("memory.residency = 'phase' needs use_lora = True: only frozen weights can leave the device")


def _check_multiple(field: str, value: int, unit: int, unit_name: str) -> None:
    if value % unit:
        below, above = value // unit * unit, (value // unit + 1) * unit
        nearest = f"{below} or {above}" if below else above
        raise ConfigError(f"{field} = {value} is not a multiple of {unit_name}; nearest: {nearest}")


def _check_truncation(c: ConfigDict) -> None:
    steps, first, minmax = c.train.num_inference_steps, c.trunc_backprop_timestep, tuple(c.truncated_backprop_minmax)
    name = "num_inference_steps" if steps == c.num_inference_steps else "train.num_inference_steps"
    if not 0 <= first < steps:
        raise ConfigError(f"trunc_backprop_timestep = {first} must be from 0 to {name} - 1 = {steps - 1}")
    if len(minmax) != 2 or not 0 <= minmax[0] < minmax[1] <= steps:
        raise ConfigError(
            f"truncated_backprop_minmax = {minmax} must be (low, high) with 0 <= low < high <= {name} = {steps}"
        )


def flatten(config: dict, prefix: str = "") -> dict:
    """{"train": {"learning_rate": 1}} -> {"train.learning_rate": 1}."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def changes(before: dict, now: dict) -> list[str]:
    """One line for each field that two (nested) configurations have with different values; where a run lies aside."""
    before, now = flatten(before), flatten(now)
    aside = ("run_name", "log_dir", "resume_from", "command")
    shared = [name for name in now if name in before and name not in aside]
    return [f"{name}: {before[name]!r} → {now[name]!r}" for name in shared if before[name] != now[name]]


def save_config(config: ConfigDict, path) -> None:
    """Writes the resolved configuration and the versions of what ran it, as JSON."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    write_json(path, {**config.to_dict(), "versions": {name: version(name) for name in packages}})
