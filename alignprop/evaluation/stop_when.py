"""Conditions that end a run before its last step, and the measures by which a checkpoint is a run's best.

A measure has the same name as in an evaluation's row: the name of a single reward, "diversity" or "base_distance".
"reward" is the reward that is trained for.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from alignprop.settings.errors import ConfigError, one_of
from rewards import WeightedReward

MEASURES = {  # what an evaluation measures besides its rewards, and what each of them needs
    "diversity": "eval_diversity = True and several pictures of a prompt in each size: raise num_eval_images or lower "
    "num_eval_prompts",
    "base_distance": "eval_base_distance = True and use_lora = True",
}


@dataclass(frozen=True)
class Condition:
    """One part of `stop_when`.

    Attributes:
        text: the part as the user wrote it.
        name: the name of the measure.
        below: True if the condition is met below the limit, False if it is met above.
        limit: a value of the measure, or a multiple of the measure's first value.
        relative: whether `limit` is such a multiple.
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
    """Parses conditions such as "clip<0.25,reward>9,clip<0.9x".

    Args:
        text: the value of `stop_when`.
        names: the names of what this run measures.

    Raises:
        ConfigError: a part is not a condition, or is about something that is not measured.
    """
    conditions = []
    for part in map(str.strip, text.split(",") if text.strip() else ()):
        name, sign, limit = (piece.strip() for piece in re.fullmatch(r"([^<>]*)([<>]?)(.*)", part).groups())
        if not (name and sign and _is_number(limit.removesuffix("x"))):
            raise ConfigError(
                f"stop_when = {text!r}: {part!r} must be a measure, < or >, and a finite number, such as 'clip<0.25' "
                "or, for 0.9 times its first value, 'clip<0.9x'"
            )
        check_measured("stop_when: measure", name, names)
        conditions.append(Condition(part, name, sign == "<", float(limit.removesuffix("x")), limit.endswith("x")))
    return conditions


def check_measured(what: str, name: str, names: Collection[str]) -> str:
    """Returns the name of a measure.

    Args:
        what: what the user wrote the name for, for the error.
        name: the name.
        names: the names of what this run measures.

    Raises:
        ConfigError: the run does not measure it.
    """
    if name in MEASURES and name not in names:
        raise ConfigError(f"{what} = {name!r} is not measured: it needs {MEASURES[name]}")
    return one_of(what, name, names)


def values(row: dict, reward: WeightedReward) -> dict[str, float]:
    """Returns the measures in an evaluation's row by name, without those that are missing or not finite.

    "reward" is computed from the means of the single rewards, because the run that wrote the row may have trained for
    another reward. With `reward_combine` = "min" it is therefore the minimum of the means, not the mean of the minima.
    """
    measures = row["rewards"] | {name: row.get(name) for name in MEASURES}
    measures = {name: value for name, value in measures.items() if value is not None and math.isfinite(value)}
    if measures.keys() >= reward.weights.keys():
        terms = {name: torch.tensor(measures[name], dtype=torch.float64) for name in reward.weights}
        measures["reward"] = float(reward.combine(terms))
    return measures


def reason_to_stop(conditions: Sequence[Condition], evaluations: Sequence[dict[str, float]]) -> str:
    """Returns the first condition that the newest evaluation meets, in words; "" if it meets none.

    Args:
        conditions: the conditions, in the order of `stop_when`.
        evaluations: the `values` of all evaluations, oldest first. A measure's first value comes from the first
            evaluation that has the measure. That evaluation itself meets no condition with "x".
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
