"""Prompt sets: loading them by name or from a file, and drawing prompts from them.

``simple_animals`` has the 45 animals that DDPO (arXiv 2305.13301) and AlignProp (arXiv 2310.03739) train on.
``hps_v2_all`` has the benchmark prompts of HPSv2 (arXiv 2306.09341), which are 800 in each of four styles.
``geneval`` and ``partiprompts`` have those of GenEval (arXiv 2310.11513) and Parti (arXiv 2206.10789). The sources of
the bundled sets are in assets/prompts/README.md.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from alignprop.engine.seeding import generator
from alignprop.settings.errors import ConfigError
from alignprop.settings.prompt_files import NEGATIVE, READERS, Rows, read_dataset, read_prompt_file, read_weights

ASSETS = Path(__file__).resolve().parent / "assets"
DATASET = "dataset:"  # before the name of a dataset
HPS_REPO = "zhwang/HPDv2"
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
HPS_HELD_OUT = 50  # prompts of each style


@dataclass(frozen=True)
class PromptSet:
    """Prompts, each with metadata that the reward gets: a dict, which is often empty.

    Attributes:
        weights: how often each prompt is drawn, relative to the others. None draws all equally often.
    """

    name: str
    prompts: tuple[str, ...]
    metadata: tuple[dict, ...]
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, streams: list[torch.Generator]) -> tuple[list[str], list[dict]]:
        """Draws a prompt and its metadata with each generator, with replacement."""
        chosen = self.choose(streams)
        return [self.prompts[i] for i in chosen], [copy(self.metadata[i]) for i in chosen]

    def choose(self, streams: list[torch.Generator]) -> list[int]:
        """Draws the index of a prompt with each generator."""
        if self.weights is None:
            return [int(torch.randint(len(self), (), generator=stream)) for stream in streams]
        ends = self._ends
        places = [ends[-1] * torch.rand((), generator=stream, dtype=torch.float64) for stream in streams]
        return [int(torch.searchsorted(ends, place, right=True)) for place in places]

    @cached_property
    def _ends(self) -> torch.Tensor:
        """The sums of the weights up to each prompt, which divide a line into parts as long as the weights."""
        return torch.tensor(self.weights, dtype=torch.float64).cumsum(dim=0)


def load_prompts(name: str, field: str = "prompt_fn") -> PromptSet:
    """Returns the prompt set called ``name``, or the prompts of a file (settings/prompt_files.py) or of a dataset.

    Args:
        name: a key of ``PROMPT_SETS``, a path, or "dataset:NAME" or "dataset:NAME:SPLIT", where NAME is a dataset of
            the Hugging Face hub or a folder. The split is "train" unless it is named.
        field: the field of the configuration that named it, for the error message.

    Raises:
        ConfigError: the name is unknown; the file is missing, empty, not UTF-8 or not in its format; or HPSv2's prompts
            or the dataset can be neither found nor fetched.
    """
    if name in PROMPT_SETS:
        return PROMPT_SETS[name](name, field)
    if name.startswith(DATASET):
        return _from_rows(name, field, lambda: read_dataset(name.removeprefix(DATASET)))
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path) or "/" in name or name.lower().endswith((".txt", *READERS)):
        return _from_rows(name, field, lambda: read_prompt_file(path))
    nearest = difflib.get_close_matches(name, PROMPT_SETS, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise ConfigError(
        f"{field} = {name!r} is not a prompt set{hint}; allowed: {', '.join(PROMPT_SETS)}, a file's path, or "
        f"{DATASET}NAME"
    )


def draw_prompts(source, seed: int, step: int | str, indices: Iterable[int]) -> tuple[list[str], list[dict]]:
    """Returns the prompts and metadata of the samples ``indices`` of the global batch of ``step``.

    Each draw depends on (seed, step, index) alone. So a sample keeps its prompt however the batch is divided into
    processes and micro-batches, and a resumed run continues with the same prompts.

    Args:
        source: a ``PromptSet``, or a user's function (callbacks.py).
    """
    return source.draw([generator(seed, step, int(j), "prompt") for j in indices])


def negatives_of(*sets: PromptSet) -> dict[str, str]:
    """Returns the negative prompt of each prompt whose metadata have one, under the name "negative_prompt".

    Raises:
        ConfigError: it is not text, or a prompt that is in several rows does not have the same one in all of them.
    """
    found: dict[str, str | None] = {}
    for one in sets:
        for prompt, row in zip(one.prompts, one.metadata, strict=True):
            negative = row.get(NEGATIVE) if isinstance(row, dict) else None
            if not isinstance(negative, str | None):
                raise ConfigError(f"{one.name!r}: {NEGATIVE} = {negative!r} of {prompt!r} must be text")
            if found.setdefault(prompt, negative) != negative:
                raise ConfigError(
                    f"{one.name!r}: {prompt!r} has the negative prompts {found[prompt]!r} and {negative!r}; in "
                    "training and evaluation it must have the same one"
                )
    return {prompt: negative for prompt, negative in found.items() if negative is not None}


def count_draws(prompts: PromptSet, seed: int, steps: range, batch_size: int) -> list[int]:
    """Returns how often `draw_prompts` draws each prompt in these steps, by drawing the indices again."""
    counts = [0] * len(prompts)
    for step in steps:
        for i in prompts.choose([generator(seed, step, j, "prompt") for j in range(batch_size)]):
            counts[i] += 1
    return counts


def told_of_epoch(prompts: PromptSet, samples: int) -> str:
    """Returns a line about the samples of an epoch and the number of prompts that they are drawn from."""
    drawn = f"it draws at random {samples} times from {len(prompts)} prompts"
    if samples == len(prompts):
        return f"an epoch is as long as the prompt set: {drawn}"
    return f"an epoch is {'shorter' if samples < len(prompts) else 'longer'} than the prompt set: {drawn}"


def told_of_draws(prompts: PromptSet, seed: int, steps: range, batch_size: int) -> str:
    """Returns a line about how many of the prompts were drawn in these steps, and how often."""
    drawn = [count for count in count_draws(prompts, seed, steps, batch_size) if count]
    low, high = min(drawn, default=0), max(drawn, default=0)
    times = f"{low} to {high} times" if low < high else "once" if high == 1 else f"{high} times"
    often = f", each {times}" if drawn else ""
    since = f" since step {steps.start}" if steps.start else ""
    return f"prompts: {len(drawn)} of {len(prompts)} were drawn{since}{often}"


def _from_rows(name: str, field: str, read: Callable[[], Rows]) -> PromptSet:
    try:
        prompts, metadata = zip(*read(), strict=True)
        weights = read_weights(prompts, metadata) if field == "prompt_fn" else None
    except ConfigError as error:
        raise ConfigError(f"{field} = {name!r}: {error}") from error
    return PromptSet(name, prompts, metadata, weights)


def _asset(filename: str) -> Callable[[str, str], PromptSet]:
    return lambda name, field: _from_rows(name, field, lambda: read_prompt_file(ASSETS / filename))


def _hps(held_out: bool) -> Callable[[str, str], PromptSet]:
    """Returns a loader of HPSv2's prompts: the last ``HPS_HELD_OUT`` of every style, or all but those.

    The last ones are for evaluation, the others for training. AlignProp's released code evaluates on 50 prompts, all of
    the style "photo"; here 50 prompts of every style are held out.
    """

    def load(name: str, field: str) -> PromptSet:
        part = slice(-HPS_HELD_OUT, None) if held_out else slice(None, -HPS_HELD_OUT)
        rows = [(prompt, style) for style in HPS_STYLES for prompt in _hps_style(style, name, field)[part]]
        return PromptSet(name, tuple(p for p, _ in rows), tuple({"style": s} for _, s in rows))

    return load


def _hps_style(style: str, name: str, field: str) -> list[str]:
    """Returns the benchmark prompts of one style, in the released order, from huggingface_hub's cache or the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    filename = f"benchmark/{style}.json"
    file = {"repo_id": HPS_REPO, "filename": filename, "repo_type": "dataset"}
    try:
        try:  # the cache comes first, so that a run with cached files needs no network
            path = hf_hub_download(**file, local_files_only=True)
        except OSError:
            get_hf_file_metadata(hf_hub_url(**file), timeout=10)  # this fails at once; a download tries for minutes
            path = hf_hub_download(**file)
    except Exception as error:  # the hub's client also lets the exceptions of its HTTP library through
        raise ConfigError(
            f"{field} = {name!r}: {filename} of the dataset {HPS_REPO} is neither in the Hugging Face cache "
            f"nor can it be fetched ({type(error).__name__}: {_one_line(error)}); set HF_HOME to a cache that has it, "
            "or give the path of a text file"
        ) from None
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        prompts = None
    is_list = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not is_list or len(prompts) <= HPS_HELD_OUT:
        raise ConfigError(f"{field} = {name!r}: {path} is not a JSON list of more than {HPS_HELD_OUT} prompts")
    return [prompt.strip() for prompt in prompts]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


PROMPT_SETS: dict[str, Callable[[str, str], PromptSet]] = {
    "simple_animals": _asset("prompts/simple_animals.txt"),
    "eval_simple_animals": _asset("prompts/eval_simple_animals.txt"),
    "hps_v2_all": _hps(held_out=False),
    "eval_hps_v2_all": _hps(held_out=True),
    "geneval": _asset("prompts/geneval.jsonl"),
    "partiprompts": _asset("prompts/partiprompts.tsv"),
    "tiny_train": _asset("tiny/prompts_train.txt"),
    "tiny_heldout": _asset("tiny/prompts_heldout.txt"),
}
