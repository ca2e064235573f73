"""The functions that a library's user hands to a trainer: how they are called, and what their mistakes cost."""

import random
import sys
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.engine.seeding import generator
from alignprop.prompts import PromptSet
from alignprop.settings.errors import ConfigError
from rewards.base import reward_name
from rewards.combine import describe

FROM_FUNCTION = "prompt_function"  # as `eval_prompt_fn`: evaluate on prompts of that function, too
_TRIALS = 8  # prompts that must come out again


class PromptFunction:
    """A person's `prompt_function() -> (prompt, metadata)` as what prompts are drawn from.

    Before each call the global generators of Python, NumPy and torch (on the CPU) are seeded from the sample's own key,
    and afterwards they are as they were. So a sample's prompt depends on (seed, step, index in the global batch) alone,
    like that of a prompt set, whatever the number of processes, the micro-batch and what was drawn before. A function
    that does not follow these generators, because it counts its calls or has a generator of its own, is refused.

    Raises:
        ConfigError: one line, for such a function, for one that fails, and for one that returns anything but a pair of
            a text and its metadata.
    """

    def __init__(self, function: Callable):
        self.function = function
        twice = [self.draw([generator("trial", j) for j in range(_TRIALS)])[0] for _ in range(2)]
        for first, again in zip(*twice, strict=True):
            if first != again:
                raise ConfigError(
                    f"prompt_function gave {_shown(first)} and then {_shown(again)} from the same random numbers: no "
                    "run could be continued. It must neither count its calls nor have a generator of its own, but draw "
                    "from random, numpy.random or torch on the CPU, as `return random.choice(prompts), {}` does"
                )

    def draw(self, streams: list[torch.Generator]) -> tuple[list[str], list]:
        """A prompt and its metadata for each of the generators, whose seeds are all that is used of them."""
        with kept_globals():
            pairs = [self._call(stream.initial_seed()) for stream in streams]
        return [prompt for prompt, _ in pairs], [metadata for _, metadata in pairs]

    def fixed(self, seed: int, count: int) -> PromptSet:
        """The prompts of `count` draws, each once, to evaluate on."""
        prompts, metadata = self.draw([generator(seed, "evaluation prompts", j) for j in range(count)])
        rows: dict[str, dict] = {}
        for prompt, row in zip(prompts, metadata, strict=True):
            rows.setdefault(prompt, row)
        return PromptSet(FROM_FUNCTION, tuple(rows), tuple(rows.values()))

    def _call(self, seed: int) -> tuple[str, object]:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which asks for every kind of device
        try:
            answer = self.function()
        except Exception as error:
            raise ConfigError(f"prompt_function failed: {describe(error, self.function)}") from error
        if not isinstance(answer, tuple | list) or len(answer) != 2 or not isinstance(answer[0], str):
            raise ConfigError(
                f"prompt_function returned {_shown(answer)}, expected (prompt, metadata), such as ('a cat', {{}})"
            )
        prompt, metadata = answer
        return str(prompt), {} if metadata is None else copy(metadata)


@contextmanager
def kept_globals():
    """After it, the global generators of Python, NumPy and torch's CPU are as they were before it."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def check_given(config, model, image_samples_hook) -> None:
    """Refuses, with one line each, what cannot be a configuration, a model and a hook.

    Raises: ConfigError.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"config is a {type(config).__name__}; it must be what alignprop.get_config('aesthetic') or another preset "
            "gives (docs/moving_from_trl.md translates TRL's)"
        )
    if model is not None and not (hasattr(model, "encode_prompts") and hasattr(model, "predict")):
        raise ConfigError(
            f"model is a {type(model).__name__}, which has no encode_prompts or no predict; leave it out and name the "
            "pipeline in pretrained.model, or give a model of alignprop.models"
        )
    if image_samples_hook is not None and not callable(image_samples_hook):
        raise ConfigError(f"image_samples_hook is a {type(image_samples_hook).__name__}, which cannot be called")


def with_names(config: ConfigDict, **functions) -> ConfigDict:
    """A copy that says, in the fields named, which functions were given in their place; None is none."""
    c = ConfigDict(config.to_dict())
    for field, function in functions.items():
        if function is not None:
            c[field] = f"{field.removesuffix('_fn')}_function {reward_name(function)}"
    return c


def call_hook(hook: Callable, evaluation, step: int, tracker) -> None:
    """`hook(data, step, tracker)` with the kept pictures of an evaluation; where it fails, one line says so.

    `data` has "images", float32 [n, 3, H, W] in [0, 1], on the CPU and the hook's own; "prompts" and "prompt_metadata",
    n each; "rewards", the reward of interest, float32 [n].
    """
    n = len(evaluation.images)
    data = {
        "images": evaluation.images.clone(),  # the run folder's are being written meanwhile
        "prompts": evaluation.prompts[:n],
        "prompt_metadata": [copy(row) for row in evaluation.metadata[:n]],
        "rewards": evaluation.rewards[:n].float(),
    }
    try:
        hook(data, step, tracker)
    except Exception as error:
        text = f"warning: step {step}: image_samples_hook failed, training goes on: {describe(error, hook)}"
        tqdm.write(text, file=sys.stderr)


def _shown(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:79] + "…"
