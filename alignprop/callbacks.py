"""Calls the functions that a user passes to a trainer, and turns their errors into one-line messages."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.engine.seeding import generator
from alignprop.prompts import PromptSet
from alignprop.settings.errors import ConfigError
from rewards.base import reward_name
from rewards.worker import describe

RewardFunction = Callable[..., Any]  # reward(images, prompts, metadata) -> scores [B], or (scores, anything)
PromptSource = Callable[[], tuple[str, Any]]  # prompt_function() -> (prompt, metadata)
SamplesHook = Callable[[dict[str, Any], int, Any], None]  # see call_hook

FROM_FUNCTION = "prompt_function"  # as `eval_prompt_fn`: evaluations use prompts of that function, too
_TRIALS = 8  # number of prompts that the function must return again from the same seeds


class PromptFunction:
    """Draws prompts from a user's `prompt_function() -> (prompt, metadata)`.

    Before each call the global generators of Python, NumPy and torch (on the CPU) are seeded from the sample's key.
    After the calls their earlier state is restored. So a sample's prompt depends on (seed, step, index in the global
    batch) alone, as with a prompt set. It does not depend on the number of processes, the micro-batch size or earlier
    draws. A function that does not follow these generators is refused, for instance one that counts its calls or has
    its own generator.

    Raises:
        ConfigError: the function does not follow the global generators, fails, or returns anything but a pair of a text
            and its metadata. The message is one line.
    """

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        twice = [self.draw([generator("trial", j) for j in range(_TRIALS)])[0] for _ in range(2)]
        for first, again in zip(*twice, strict=True):
            if first != again:
                raise ConfigError(
                    f"prompt_function gave {_shown(first)} and then {_shown(again)} from the same random numbers, so "
                    "a run could not be resumed with the same prompts. It must neither count its calls nor have a "
                    "generator of its own, but draw from random, numpy.random or torch on the CPU, as "
                    "`return random.choice(prompts), {}` does"
                )

    def draw(self, streams: list[torch.Generator]) -> tuple[list[str], list[Any]]:
        """Returns a prompt and its metadata for each generator. Only the initial seed of the generator is used."""
        with kept_globals():
            pairs = [self._call(stream.initial_seed()) for stream in streams]
        return [prompt for prompt, _ in pairs], [metadata for _, metadata in pairs]

    def fixed(self, seed: int, count: int) -> PromptSet:
        """Returns the prompts of `count` draws, to evaluate on. Each prompt is in the set once."""
        prompts, metadata = self.draw([generator(seed, "evaluation prompts", j) for j in range(count)])
        rows: dict[str, dict[str, Any]] = {}
        for prompt, row in zip(prompts, metadata, strict=True):
            rows.setdefault(prompt, row)
        return PromptSet(FROM_FUNCTION, tuple(rows), tuple(rows.values()))

    def _call(self, seed: int) -> tuple[str, object]:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every kind of device
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
def kept_globals() -> Iterator[None]:
    """Restores the global generators of Python, NumPy and torch (on the CPU) at the end of a `with` block."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def check_given(config: Any, model: Any, image_samples_hook: Any) -> None:
    """Checks that the arguments of a trainer can be a configuration, a model and a hook.

    Raises:
        ConfigError: one of them cannot. The message is one line.
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


def with_names(config: ConfigDict, **functions: Callable[..., Any] | None) -> ConfigDict:
    """Returns a copy in which each given field names the function that replaces it. None: no function replaces it."""
    c = ConfigDict(config.to_dict())
    for field, function in functions.items():
        if function is not None:
            c[field] = f"{field.removesuffix('_fn')}_function {reward_name(function)}"
    return c


def call_hook(hook: Callable[..., Any], evaluation: Any, step: int, tracker: Any) -> None:
    """Calls `hook(data, step, tracker)` with the kept pictures of an evaluation. If the hook fails, one line says so.

    `data` is a dict with
        "images": the n pictures, float32 [n, 3, H, W] in [0, 1], on the CPU; the hook may change them. In a run
            with several sizes this is a list of n pictures [3, H, W].
        "prompts", "prompt_metadata": a list of n each.
        "rewards": the reward of the run, float32 [n].
    """
    n = len(evaluation.images)
    data = {
        "images": deepcopy(evaluation.images),  # the originals are being written to the run folder meanwhile
        "prompts": evaluation.prompts[:n],
        "prompt_metadata": [copy(row) for row in evaluation.metadata[:n]],
        "rewards": evaluation.rewards[:n].float(),
    }
    try:
        hook(data, step, tracker)
    except Exception as error:
        text = f"warning: step {step}: image_samples_hook failed, training goes on: {describe(error, hook)}"
        tqdm.write(text, file=sys.stderr)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:79] + "…"
