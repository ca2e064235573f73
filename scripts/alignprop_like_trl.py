"""Trains AlignProp with the flags of TRL's example script, towards LAION's aesthetic score.

    accelerate launch scripts/alignprop_like_trl.py --num_epochs=20 --train_gradient_accumulation_steps=4 \
        --sample_num_steps=50 --train_batch_size=8 --log_with=wandb

Any field of ours can be given as well, such as `--config.memory_policy=lean`. `translate` and docs/moving_from_trl.md
say what each flag becomes. If a flag has no counterpart, a message says what to use instead.
"""

import argparse
import ast
import difflib
import os
import random
import re
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ml_collections import ConfigDict
from tqdm.auto import tqdm

import alignprop
from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS
from alignprop.settings.resolve import check_name

SAME = {  # TRL's flag: its default in TRL, and our field of the same meaning
    "pretrained_model": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "pretrained.model"),
    "pretrained_revision": ("main", "pretrained.revision"),
    "use_lora": (True, "use_lora"),
    "hf_hub_aesthetic_model_id": ("trl-lib/ddpo-aesthetic-predictor", "aesthetic.head_repo"),
    "hf_hub_aesthetic_model_filename": ("aesthetic-model.pth", "aesthetic.head_file"),
    "run_name": ("", "run_name"),
    "logdir": ("logs", "log_dir"),
    "log_with": ("", "log_with"),
    "seed": (0, "seed"),
    "resume_from": ("", "resume_from"),
    "num_epochs": (100, "num_epochs"),
    "save_freq": (1, "save_freq"),
    "num_checkpoint_limit": (5, "num_checkpoint_limit"),
    "allow_tf32": (True, "allow_tf32"),
    "sample_num_steps": (50, "num_inference_steps"),
    "sample_eta": (1.0, "eta"),
    "sample_guidance_scale": (5.0, "guidance_scale"),
    "train_batch_size": (1, "per_gpu_capacity"),
    "train_learning_rate": (1e-3, "train.learning_rate"),
    "train_adam_beta1": (0.9, "train.adam_beta1"),
    "train_adam_beta2": (0.999, "train.adam_beta2"),
    "train_adam_weight_decay": (1e-4, "train.adam_weight_decay"),
    "train_adam_epsilon": (1e-8, "train.adam_epsilon"),
    "train_max_grad_norm": (1.0, "train.max_grad_norm"),
}
CHANGED = {  # TRL's flag: its default here. `translate` turns it into our fields.
    "mixed_precision": "fp16",
    "log_image_freq": 10,  # TRL has 1, because it shows the pictures of training. Here it is a whole evaluation.
    "train_gradient_accumulation_steps": 1,
    "truncated_backprop_rand": True,
    "truncated_backprop_timestep": None,
    "truncated_rand_backprop_minmax": None,
    "push_to_hub": False,
    "hf_hub_model_id": "alignprop-finetuned-stable-diffusion",
}
MISSING = {  # TRL's flag: what to use instead
    "train_use_8bit_adam": "--config.train.optimizer=adafactor saves the optimizer's memory",
    "negative_prompts": "--config.negative_prompt='…' is one prompt for all pictures",
    "tracker_kwargs": "see the tracker's own environment variables, such as WANDB_ENTITY",
    "accelerator_kwargs": "see the flags of `accelerate launch`, and --mixed_precision",
    "project_kwargs": "see --logdir and --run_name, the folder of a run, and --num_checkpoint_limit",
}
IDLE = {  # TRL's flag, which changes no result: what to use instead
    "exp_name": "--run_name names the folder of a run",
    "tracker_project_name": "trackers put runs in the project 'alignprop'; --run_name names a run",
}


class OneLine(argparse.ArgumentParser):
    """A parser that raises a ConfigError for a mistake, instead of printing a page of usage."""

    def error(self, message: str):
        raise ConfigError(message)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def add(name, **options):
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **options)

    for name, default in {**{name: default for name, (default, _) in SAME.items()}, **CHANGED}.items():
        if isinstance(default, bool):
            add(name, type=to_bool, nargs="?", const=True, default=default)
            if default:
                add(f"no_{name}", action="store_false", dest=name)
        elif name == "truncated_rand_backprop_minmax":
            add(name, type=int, nargs=2, metavar=("LOW", "HIGH"))
        else:
            add(name, type=int if default is None else type(default), default=default)
    for name in (*MISSING, *IDLE):
        add(name, nargs="?", const=True, help="has no counterpart")
    return parser


def to_bool(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def translate(given: argparse.Namespace, num_processes: int) -> dict:
    """Returns our fields and their values for TRL's flags.

    An epoch of TRL is one optimizer step of batch size × accumulation steps × processes samples, and so it is here.
    TRL's loss is 10 minus the mean reward, which has the gradient of `loss="maximise"` with a coefficient of 1. TRL
    draws for each step of the chain whether it carries gradient, which is `estimator="per_step"`.
    """
    fields = {field: getattr(given, name) for name, (_, field) in SAME.items()}
    samples = given.train_batch_size * given.train_gradient_accumulation_steps * num_processes
    fields |= {
        "mixed_precision": {"none": "no"}.get(given.mixed_precision, given.mixed_precision),
        "eval_freq": given.log_image_freq,
        "train.total_batch_size": samples,
        "train.total_samples_per_epoch": samples,
        "train.loss_coeff": 1.0,
        "estimator": "per_step" if given.truncated_backprop_rand else "truncated",
    }
    if given.pretrained_revision == "main":
        del fields["pretrained.revision"]
    if given.truncated_backprop_rand and given.truncated_rand_backprop_minmax:
        fields["truncated_backprop_minmax"] = tuple(given.truncated_rand_backprop_minmax)
    if not given.truncated_backprop_rand and given.truncated_backprop_timestep is not None:
        fields["trunc_backprop_timestep"] = given.truncated_backprop_timestep
    if given.push_to_hub:
        fields["hub.repo"] = given.hf_hub_model_id
    return fields


def set_field(config: ConfigDict, field: str, value) -> None:
    """Sets a field by its dotted name, such as "train.learning_rate".

    Raises:
        ConfigError: The name is unknown, or the value is of the wrong kind.
    """
    check_name(field)
    *path, name = field.split(".")
    place = config
    for part in path:
        place = place[part]
    kind = place.get_type(name)
    if isinstance(value, str) and kind is not str:
        with suppress(ValueError, SyntaxError):  # such as "auto", for a field that also takes a number
            value = ast.literal_eval(value)
    if kind is tuple and not isinstance(value, tuple):
        value = (value,)
    try:
        place[name] = value
    except TypeError:
        raise ConfigError(f"{field} = {value!r} must be {FIELDS[field].rule.wanted}") from None


def configuration(arguments: list[str], num_processes: int) -> ConfigDict:
    """Returns the configuration that a command line asks for. Raises a ConfigError of one line for a mistake in it."""
    given, rest = make_parser().parse_known_args(arguments)
    for name in (name for name in MISSING if getattr(given, name) is not None):
        raise ConfigError(f"--{name} has no counterpart here: {MISSING[name]}")
    for name in (name for name in IDLE if getattr(given, name) is not None):
        print(f"warning: --{name} has no effect: {IDLE[name]}", file=sys.stderr)
    config = alignprop.get_config("aesthetic")
    config.loss, config.loss_target = "maximise", None
    ours = [argument.removeprefix("--config.").partition("=") for argument in rest]
    for argument in rest:
        if not re.match(r"--config\.[^=]+=", argument):
            near = difflib.get_close_matches(argument.lstrip("-").partition("=")[0], [*SAME, *CHANGED, *MISSING], n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise ConfigError(f"{argument!r} is not a flag{hint}; fields of ours look like --config.guidance_scale=7.5")
    for field, value in [*translate(given, num_processes).items(), *((field, value) for field, _, value in ours)]:
        set_field(config, field, value)
    return config


PROMPTS = Path(__file__).resolve().parent.parent / "alignprop" / "assets" / "prompts"
ANIMALS = (PROMPTS / "simple_animals.txt").read_text().split()


def prompt_function():
    return random.choice(ANIMALS), {}


def say_best(data, global_step, tracker):
    """An `image_samples_hook` that prints the best sample. The pictures are in the run's folder and at the trackers."""
    best = int(data["rewards"].argmax())
    tqdm.write(f"step {global_step}: best is {data['prompts'][best]!r} with {data['rewards'][best]:.3f}")


def main(arguments: list[str]) -> None:
    config = configuration(arguments, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    alignprop.AlignPropTrainer(config, prompt_function=prompt_function, image_samples_hook=say_best).train()


if __name__ == "__main__":
    with alignprop.plain_endings():
        main(sys.argv[1:])
