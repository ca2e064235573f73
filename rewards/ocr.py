"""How well a picture shows the text that its prompt asks for, as a text recogniser reads it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rewards.base import Reward
from rewards.errors import RewardError, first_line
from rewards.pictures import to_pictures

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OcrReward(Reward):
    """The share of the wanted text that the picture shows, from 0 to 1. It has no gradient.

    It is the formula of Flow-GRPO (arXiv 2505.05470): 1 - min(d, n) / n. Here d is the edit distance between what is
    read and what is wanted, and n is the length of what is wanted. It is 1 if the picture shows the wanted text among
    other text. Spaces and case do not matter, punctuation does.

    The wanted text is metadata {"text": "OPEN"}, or else the first text in double quotes in the prompt.

    The recogniser is that of the package rapidocr (PP-OCR), whose weights are in the package. Flow-GRPO used PaddleOCR,
    so its scores may differ. Text that is turned by 90 or 180 degrees is not read.

    Raises:
        RewardError: The package is not installed, or a prompt asks for no text.
    """

    differentiable = False

    def __init__(self):
        super().__init__()
        self.read = load_recogniser()

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        wanted = [wanted_text(*row) for row in zip(prompts, metadata or [{}] * len(prompts), strict=True)]
        found = [self.read(picture) for picture in to_pictures(images)]
        return torch.tensor([match(*pair) for pair in zip(found, wanted, strict=True)], device=images.device)


def wanted_text(prompt: str, row: Mapping) -> str:
    """Returns the text that a picture should show. The metadata takes precedence over the prompt.

    Raises:
        RewardError: Neither has one.
    """
    if "text" in row:
        text = str(row["text"] or "")
    else:
        quoted = QUOTED.search(prompt)
        text = (quoted[1] or quoted[2]) if quoted else ""
    if not plain(text):
        raise RewardError(
            f"prompt {prompt!r}: the ocr reward finds no text to look for; put it in double quotes, as in "
            "'a sign that says \"OPEN\"', or give metadata 'text'"
        )
    return text


def match(found: str, wanted: str) -> float:
    """Returns the score in [0, 1] of the text that was found, given the text that was wanted."""
    found, wanted = plain(found), plain(wanted)
    if wanted in found:
        return 1.0
    return 1 - min(edit_distance(found, wanted), len(wanted)) / len(wanted)


def plain(text: str) -> str:
    return text.replace(" ", "").lower()


def edit_distance(a: str, b: str) -> int:
    """Returns the fewest insertions, deletions and replacements of one character that turn `a` into `b` (Levenshtein).

    It takes len(a) · len(b) steps.
    """
    distances = list(range(len(b) + 1))  # from the part of `a` that was read to each beginning of `b`
    for i, left in enumerate(a, start=1):
        before, distances = distances, [i]
        for j, right in enumerate(b):
            distances.append(min(before[j] + (left != right), before[j + 1] + 1, distances[j] + 1))
    return distances[-1]


def load_recogniser() -> Callable[[Any], str]:
    """Returns a function that reads the text in a PIL picture, its lines joined without a space.

    Raises:
        RewardError: The package rapidocr or its onnxruntime cannot be imported.
    """
    try:
        import onnxruntime  # noqa: F401  (rapidocr itself asks for it only when it reads its first picture)
        from rapidocr import RapidOCR

        # Flow-GRPO does not look for text that is upside down ("cls") either.
        recogniser = RapidOCR(params={"Global.use_cls": False, "Global.log_level": "error"})
    except ImportError as error:
        raise RewardError(
            "the reward 'ocr' needs the packages rapidocr and onnxruntime: pip install 'alignprop[judges]' "
            f"({first_line(error)})"
        ) from error
    return lambda picture: "".join(recogniser(picture).txts or ())
