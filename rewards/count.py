"""Rewards for pictures that hold as many objects as the prompt says, by an object detector or in the bundled world."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch

from rewards import tiny_judge
from rewards.base import Reward
from rewards.detectors import load_detector
from rewards.errors import RewardError

NUMBERS = {
    "no": 0, "zero": 0, "a": 1, "an": 1, "one": 1, "single": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
    "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
# A noun phrase ends before one of these words or a mark. It also ends before a verb in -ing (see `parse_count`).
ENDS = re.compile(
    r"on|in|at|with|and|or|of|under|over|above|below|behind|beside|near|next|to|by|from|into|onto|inside|between|"
    r"against|around|through|that|who|which|is|are|was|were|has|have|\W"
)
MEDIUM = re.compile(r"^(an?|the)?\s*([\w-]+ )*?(photo|photograph|picture|image|painting|drawing) of ")
COLLECTIVES = {"group", "bunch", "herd", "flock", "crowd", "lot", "pile", "row", "few", "pair", "couple", "dozen"}
IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "knives": "knife", "wolves": "wolf", "leaves": "leaf", "buses": "bus",
    "potatoes": "potato", "tomatoes": "tomato", "cookies": "cookie", "ties": "tie", "pies": "pie", "skis": "skis",
    "sheep": "sheep", "fish": "fish", "scissors": "scissors",
}  # fmt: skip

OVERLAP = 0.5  # Two boxes with a higher intersection over union are the same object.
TEMPERATURE = 0.5  # The width of the soft count's step, in log-odds.


class CountReward(Reward):
    """Minus the absolute difference between the number of objects that a detector finds and the number wanted.

    Of overlapping boxes, only the one with the highest score is kept (non-maximum suppression, which has no gradient).
    The count is soft: each kept box counts sigmoid((score - threshold) / TEMPERATURE). Both are log-odds, because
    probabilities saturate near 0 and 1. Boxes far from the threshold have little gradient, so the gradient comes mostly
    from objects that are almost there or almost gone.

    The best score is 0. What to count comes from metadata {"object": "dog", "count": 2}, or else from the prompt (see
    `parse_count`).

    Args:
        model: The hub name or folder of a detector: OWL-ViT or OWLv2, which detect whatever has a name, or YOLOS or
            DETR, which detect the classes they were trained on.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        threshold: The score from which a box is an object. None: 0.1 for OWL, 0.5 for the others.

    Raises:
        RewardError: The detector cannot be loaded.
    """

    def __init__(
        self,
        model: str = "google/owlvit-base-patch32",
        revision: str | None = None,
        threshold: Annotated[float, (0, 1), "exclusive"] | None = None,
    ):
        super().__init__()
        self.detector = load_detector(model, revision, field="count.model")
        threshold = self.detector.usual_threshold if threshold is None else threshold
        self.threshold = math.log(threshold / (1 - threshold))

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        wanted = [wanted_count(*row) for row in zip(prompts, metadata or [{}] * len(prompts), strict=True)]
        log_odds, boxes = self.detector(images, [name for name, _ in wanted])
        stays = torch.stack([survivors(*one) for one in zip(boxes, log_odds, strict=True)])
        counts = (self.presence(log_odds) * stays).sum(dim=1)
        return -(counts - counts.new_tensor([count for _, count in wanted])).abs()

    def presence(self, log_odds: torch.Tensor) -> torch.Tensor:
        """Returns how much each box counts, in [0, 1], from its log-odds [B, N]."""
        return torch.sigmoid((log_odds - self.threshold) / TEMPERATURE)


class HardCountReward(CountReward):
    """Counts in whole numbers: a box counts 1 above the threshold, else 0. For measuring only: it has no gradient."""

    differentiable = False

    @torch.no_grad()
    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return super().score(images, prompts, metadata)

    def presence(self, log_odds: torch.Tensor) -> torch.Tensor:
        return (log_odds > self.threshold).float()


class TinyCountReward(Reward):
    """The log-probability, ≤ 0, that a picture of the bundled tiny world holds as many shapes as its prompt names.

    It comes from the bundled judge's count classes (one, two, three, four or more). After training on this reward, the
    judge's count is no longer an independent measure. Metadata {"count": 2} takes precedence over the prompt.

    Raises:
        RewardError: A prompt is not of the tiny world's form, or a count is below 1.
    """

    def __init__(self):
        super().__init__()
        self.judge = tiny_judge.load()

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        rows = zip(prompts, metadata or [{}] * len(prompts), strict=True)
        wanted = torch.tensor([self.class_of(*row) for row in rows], device=images.device)
        content, _ = self.judge(images)
        return content["count"].log_softmax(dim=1).gather(1, wanted[:, None]).squeeze(1)

    def class_of(self, prompt: str, row: Mapping) -> int:
        if "count" not in row:
            return tiny_judge.parse(prompt, self.judge.config)[0]
        return min(_checked(row["count"], 1), len(self.judge.config["counts"])) - 1


def wanted_count(prompt: str, row: Mapping) -> tuple[str, int]:
    """Returns the object and the number wanted. The metadata takes precedence over the prompt.

    Raises:
        RewardError: The metadata is not allowed, or the prompt has no number with an object.
    """
    if not {"object", "count"} <= set(row):
        name, count = parse_count(prompt)
        row = {"object": name, "count": count, **row}
    if not isinstance(row["object"], str) or not row["object"].strip():
        raise RewardError(f"metadata 'object' is {row['object']!r}; it is the name of what to count")
    return row["object"].strip(), _checked(row["count"], 0)


def parse_count(prompt: str) -> tuple[str, int]:
    """Returns ("red circle", 2) for "two red circles on a blue background": the first number and its noun phrase.

    Numbers are digits, "a", "an", "single", "one" … "twelve", "no" and "zero". "a photo of" at the beginning is
    skipped. The phrase ends before a preposition, a conjunction, a mark or a verb in -ing.

    Raises:
        RewardError: The prompt has no number with an object.
    """
    words = re.findall(r"[\w'-]+|[^\w\s]", MEDIUM.sub("", prompt.strip().lower()))
    start = next((i for i, word in enumerate(words) if word.isdecimal() or word in NUMBERS), len(words))
    phrase = []
    for word in words[start + 1 :]:
        if ENDS.fullmatch(word) or (phrase and word.endswith("ing")):
            break
        phrase.append(word)
    if not phrase or phrase[-1] in COLLECTIVES:
        raise RewardError(
            f"prompt {prompt!r}: the count reward finds no number with an object, as in 'two dogs'; say so, or give "
            "metadata 'object' and 'count'"
        )
    count = int(words[start]) if words[start].isdecimal() else NUMBERS[words[start]]
    return " ".join([*phrase[:-1], phrase[-1] if count == 1 else singular(phrase[-1])]), count


def singular(word: str) -> str:
    """Returns an English noun without its plural ending."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(ch|sh|ss|x|zz)es$", word):
        return word[:-2]
    return word[:-1] if re.search(r"[^s]s$", word) else word


@torch.no_grad()
def survivors(boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Returns which of boxes [N, 4] (left, top, right, bottom) greedy non-maximum suppression keeps, [N] bool.

    A box is dropped if a kept box with a higher score [N] overlaps it by more than OVERLAP.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    size = (
        torch.minimum(ranked[:, None, 2:], ranked[:, 2:]) - torch.maximum(ranked[:, None, :2], ranked[:, :2])
    ).clamp(0)
    shared, area = size.prod(dim=-1), (ranked[:, 2:] - ranked[:, :2]).prod(dim=-1)
    better = (shared > OVERLAP * (area[:, None] + area - shared)).triu(1)
    # Rank k is final after at most k rounds. In practice a few suffice, as many as the longest chain of overlaps.
    stays, before = torch.ones_like(better[0]), None
    while before is None or not torch.equal(stays, before):
        stays, before = ~(better & stays[:, None]).any(dim=0), stays
    return torch.empty_like(stays).scatter(0, order, stays)


def _checked(count, lowest: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < lowest:
        raise RewardError(f"metadata 'count' is {count!r}; allowed: a whole number from {lowest}")
    return count
