"""What ends a run before its last step, and what makes a checkpoint its best: conditions on what evaluations measure.

A measure has the name that it has in an evaluation's row: a single reward's, "diversity", "base_distance"; "reward" is
what is trained for.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from alignprop.settings.errors import ConfigError, one_of
from rewards import WeightedReward

MEASURES = ("diversity", "base_distance")  # of an evaluation, besides its rewards


@dataclass(frozen=True)
class Condition:
    """One part of `stop_when`.

    Attributes:
        text: as it was written.
        name: of the measure.
        below: it is met below the limit; else above.
        limit: a value of the measure, or the multiple of its first value.
        relative: whether it is that multiple.
    """

    text: str
    name: str
    below: bool
    limit: float
    relative: bool

    def met(self, now: float, first: float) -> bool:
        limit = self.limit * first if self.relative else self.limit
        return now < limit if self.below else now > limit


def parse_stop_when(text: str, names: Collection[str]) -> list[Condition]:
    """ "clip<0.25,reward>9,clip<0.9x" as conditions.

    Args:
        names: of what is measured.

    Raises:
        ConfigError: a part is no condition, or about something that is not measured.
    """
    conditions = []
    for part in map(str.strip, text.split(",") if text.strip() else ()):
        name, sign, limit = (piece.strip() for piece in re.fullmatch(r"([^<>]*)([<>]?)(.*)", part).groups())
        if not (name and sign and _is_number(limit.removesuffix("x"))):
            raise ConfigError(
                f"stop_when = {text!r}: {part!r} must be a measure, < or >, and a finite number, such as 'clip<0.25' "
                "or, for 0.9 times its first value, 'clip<0.9x'"
            )
        one_of("stop_when: measure", name, names)
        conditions.append(Condition(part, name, sign == "<", float(limit.removesuffix("x")), limit.endswith("x")))
    return conditions


def values(row: dict, reward: WeightedReward) -> dict[str, float]:
    """What an evaluation's row has, by name; what it has not, or is not finite, is left out.

    "reward" is computed from the means of the single rewards, because the run that wrote the row may have been after
    another one. With `reward_combine` = "min" it is then the least of the means, not the mean of the least.
    """
    measures = row["rewards"] | {name: row.get(name) for name in MEASURES}
    measures = {name: value for name, value in measures.items() if value is not None and math.isfinite(value)}
    if measures.keys() >= reward.weights.keys():
        terms = {name: torch.tensor(measures[name], dtype=torch.float64) for name in reward.weights}
        measures["reward"] = float(reward.combine(terms))
    return measures


def reason_to_stop(conditions: Sequence[Condition], evaluations: Sequence[dict[str, float]]) -> str:
    """The first condition that the newest evaluation meets, in words; "" where there is none.

    Args:
        evaluations: the `values` of all of them, oldest first. A measure's first value is that of the first evaluation
            that has it, which itself meets no condition with "x".
    """
    for condition in conditions:
        having = [measures[condition.name] for measures in evaluations if condition.name in measures]
        if not having or condition.name not in evaluations[-1] or (condition.relative and len(having) == 1):
            continue
        if condition.met(having[-1], having[0]):
            return f"stop_when = {condition.text!r}: {condition.name} is {having[-1]:.4g}, at first {having[0]:.4g}"
    return ""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.IGNORECASE) is not None
