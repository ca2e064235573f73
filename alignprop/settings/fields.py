"""What each field of a configuration may be: one row a field.

A row is about the field alone. What several fields must have in common is in `settings.resolve`, and what only a
module further up can know (does this file exist, is there such a reward) is that module's to say: `checked_by`.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from alignprop.settings.memory_policies import POLICIES


@dataclass(frozen=True)
class Rule:
    """
    Attributes:
        wanted: completes "<field> = <value> must be …".
        accepts: whether a value is that.
        choices: the allowed values, where there are few.
        checked_by: the module that checks what this rule cannot.
    """

    wanted: str
    accepts: Callable[[object], bool]
    choices: tuple[str, ...] = ()
    checked_by: str = ""


def choice(*names: str) -> Rule:
    return Rule(f"one of {', '.join(map(repr, names))}", lambda value: value in names, names)


def integer(low: int, checked_by: str = "") -> Rule:
    return Rule(f"a whole number of at least {low}", lambda v: _is_integer(v) and v >= low, checked_by=checked_by)


def number(*, above=-math.inf, at_least=-math.inf, below=math.inf, at_most=math.inf) -> Rule:
    """A finite number within the limits; whole numbers are numbers too."""
    limits = {"greater than": above, "at least": at_least, "less than": below, "at most": at_most}
    allowed = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))
    return Rule(
        f"a finite number {allowed}".rstrip(),
        lambda v: _is_finite(v) and above < v < below and at_least <= v <= at_most,
    )


def boolean() -> Rule:
    return Rule("True or False", lambda value: isinstance(value, bool))


def text(empty: bool = False, checked_by: str = "") -> Rule:
    return Rule(
        "text" if empty else "text that is not empty",
        lambda value: isinstance(value, str) and (empty or bool(value.strip())),
        checked_by=checked_by,
    )


def sequence(of: str, accepts: Callable[[object], bool], length: int | None = None) -> Rule:
    def accepts_all(value) -> bool:
        right_length = isinstance(value, tuple | list) and (len(value) == length if length else len(value) > 0)
        return right_length and all(map(accepts, value))

    return Rule(f"{length or 'one or more'} {of}, separated by commas", accepts_all)


def optional(rule: Rule) -> Rule:
    return Rule(f"None or {rule.wanted}", lambda v: v is None or rule.accepts(v), rule.choices, rule.checked_by)


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_name(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_folder_name(value) -> bool:
    """A file name on any system, or "": short enough that what is appended to it still is one."""
    if not isinstance(value, str) or value in (".", "..") or len(os.fsencode(value)) > 200:
        return False
    return not any(character in "/\\" or ord(character) < 32 for character in value)


def is_repo_name(value) -> bool:
    """Whether the Hugging Face hub would have a repository of that name, "user/name"."""
    part = r"\w([\w.-]{0,94}\w)?"
    named = isinstance(value, str) and re.fullmatch(f"{part}/{part}", value, re.ASCII) is not None
    return named and not ("--" in value or ".." in value or value.endswith(".git"))


COUNT = integer(1)
PRECISION = choice("float32", "bfloat16", "float16")
HUB_NAME = text(checked_by="rewards.towers")

FIELDS: dict[str, Rule] = {
    "task": choice("train", "evaluate", "evaluate_soup", "guide"),
    "algorithm": choice("align_prop", "ddpo"),
    "run_name": Rule("a plain folder name of at most 200 bytes, without / and \\", _is_folder_name),
    "log_dir": text(checked_by="alignprop.run"),
    "log_with": text(empty=True, checked_by="alignprop.runs.tracking"),
    "seed": integer(0),
    "resume_from": text(empty=True, checked_by="alignprop.runs.checkpoint"),
    "save_freq": COUNT,
    "num_checkpoint_limit": integer(0),
    "mixed_precision": choice("no", "fp16", "bf16"),
    "allow_tf32": boolean(),
    "channels_last": optional(boolean()),
    "compile": boolean(),
    "timeout_minutes": number(above=0, at_most=7 * 24 * 60),
    "hub.repo": Rule(
        "empty or 'user/name', each of at most 96 letters, digits, '_', '-' and '.', such as the hub allows",
        lambda value: value == "" or is_repo_name(value), checked_by="alignprop.publish.hub",
    ),
    "hub.private": boolean(),

    "pretrained.model": text(checked_by="alignprop.models.loading"),
    "pretrained.revision": optional(text(checked_by="alignprop.models.loading")),
    "pretrained.config": optional(text(checked_by="alignprop.models.loading")),
    "pretrained.vae": optional(text(checked_by="alignprop.models.loading")),
    "pretrained.without": text(empty=True, checked_by="alignprop.models.latent"),
    "resolution": optional(integer(16, checked_by="alignprop.models.latent")),
    "use_lora": boolean(),
    "train_text_encoder": boolean(),
    "lora_rank": COUNT,
    "lora_alpha": optional(number(above=0)),
    "lora_target_modules": optional(sequence("names of layers", _is_name)),

    "num_inference_steps": integer(1, checked_by="alignprop.method.samplers"),
    "guidance_scale": number(at_least=1),
    "true_cfg_scale": number(at_least=1),
    "eta": number(at_least=0, at_most=1),

    "estimator": text(checked_by="alignprop.trainer"),
    "trunc_backprop_timestep": optional(integer(0)),
    "truncated_backprop_minmax": optional(sequence("whole numbers", _is_integer, length=2)),
    "plan.num_active": optional(COUNT),
    "plan.exit_window": optional(number(above=0, at_most=1)),
    "plan.copies": optional(COUNT),
    "plan.late_bias": optional(number(at_least=0)),
    "plan.rescale": optional(number(at_least=0, at_most=1)),
    "plan.coupling": optional(number(at_least=0, at_most=1)),
    "plan.order": optional(COUNT),
    "plan.support_scale": optional(number(above=0, at_most=1)),
    "guidance_grad": choice("both", "cond"),
    "adjoint_clip": number(at_least=0),

    "reward_fn": text(checked_by="rewards"),
    "eval_reward_fn": text(empty=True, checked_by="rewards"),
    "loss": choice("maximise", "target", "ceiling"),
    "loss_target": optional(number()),
    "reward_combine": choice("sum", "mean", "min"),
    "reward_noise": number(at_least=0),
    "kl_coeff": number(at_least=0),
    "grad_scale": number(above=0),
    "aesthetic.clip": HUB_NAME,
    "aesthetic.head_repo": HUB_NAME,
    "aesthetic.head_file": text(checked_by="rewards.aesthetic"),
    "aesthetic.dtype": PRECISION,
    "hps.version": choice("v2.0", "v2.1"),
    "hps.checkpoint": optional(text(checked_by="rewards.towers")),
    "hps.tokenizer": HUB_NAME,
    "hps.dtype": PRECISION,
    "hps.backend": choice("transformers", "hpsv2"),
    "pickscore.model": HUB_NAME,
    "pickscore.processor": HUB_NAME,
    "pickscore.dtype": PRECISION,
    "imagereward.checkpoint": optional(text(checked_by="rewards.towers")),
    "imagereward.tokenizer": HUB_NAME,
    "imagereward.dtype": PRECISION,
    "clip.model": HUB_NAME,
    "clip.dtype": PRECISION,
    "siglip.model": HUB_NAME,
    "siglip.dtype": PRECISION,
    "count.model": HUB_NAME,
    "count.threshold": optional(number(above=0, below=1)),
    "colour.target": sequence("numbers from 0 to 1", lambda v: _is_finite(v) and 0 <= v <= 1, length=3),
    "jpeg.quality": Rule("a whole number from 1 to 100", lambda v: _is_integer(v) and 1 <= v <= 100),

    "prompt_fn": text(checked_by="alignprop.prompts"),
    "eval_prompt_fn": text(checked_by="alignprop.prompts"),
    "eval_freq": integer(0),
    "resume_from_2": text(checked_by="alignprop.runs.checkpoint"),
    "mixing_coef_1": sequence("finite numbers", _is_finite),
    "allow_extrapolation": boolean(),
    "soup_mode": choice("delta", "factors"),
    "num_eval_images": COUNT,
    "num_eval_prompts": optional(COUNT),
    "eval_diversity": boolean(),
    "eval_base_distance": boolean(),
    "stop_when": text(empty=True, checked_by="alignprop.evaluation.stop_when"),
    "best_by": text(empty=True, checked_by="alignprop.evaluation.stop_when"),
    "lora_scale": number(),
    "lora_schedule": choice("constant", "linear"),
    "max_vis_images": COUNT,

    "guide.strength": number(above=0),
    "guide.through": choice("denoiser", "x0"),
    "guide.schedule": choice("constant", "noise", "late"),
    "guide.window": sequence("numbers from 0 to 1", lambda v: _is_finite(v) and 0 <= v <= 1, length=2),

    "ddpo.inner_epochs": COUNT,
    "ddpo.clip_range": number(above=0),
    "ddpo.adv_clip_max": number(above=0),
    "ddpo.timestep_fraction": number(above=0, at_most=1),
    "ddpo.min_noise": number(at_least=0),
    "ddpo.per_prompt_buffer": integer(0),
    "ddpo.per_prompt_min_count": COUNT,

    "memory_policy": choice("auto", *POLICIES),
    "memory.sweep_chunk": optional(integer(0)),
    "memory.decode_chunk": optional(integer(0)),
    "memory.guidance_batching": optional(choice("joint", "split")),
    "memory.keep_steps": optional(integer(0)),
    "memory.block_checkpointing": optional(boolean()),
    "memory.decoder_checkpointing": optional(boolean()),
    "memory.residency": optional(choice("all", "phase")),
    "memory.lean": optional(boolean()),

    "num_epochs": COUNT,
    "per_gpu_capacity": Rule(f"'auto' or {COUNT.wanted}", lambda v: v == "auto" or COUNT.accepts(v)),
    "train.total_batch_size": COUNT,
    "train.total_samples_per_epoch": COUNT,
    "train.num_inference_steps": optional(integer(1, checked_by="alignprop.method.samplers")),
    "train.optimizer": choice("adamw", "adafactor", "sgd"),
    "train.learning_rate": number(above=0),
    "train.adam_beta1": number(at_least=0, below=1),
    "train.adam_beta2": number(at_least=0, below=1),
    "train.adam_weight_decay": number(at_least=0),
    "train.adam_epsilon": number(above=0),
    "train.max_grad_norm": number(above=0),
    "train.loss_coeff": number(above=0),
    "train.ema_decay": number(at_least=0, below=1),
    "train.max_skipped_steps": COUNT,
}  # fmt: skip

# Fields that no person sets: the preset's name, main.py's command line, and what `settings.resolve` derives.
DERIVED = ("preset", "command", "train.gradient_accumulation_steps", "train.steps_per_epoch")
