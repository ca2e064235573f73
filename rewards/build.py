"""Builds a reward from its spec, such as "hps:1,aesthetic:0.1"."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from rewards.base import Reward, did_you_mean, reward_name
from rewards.combine import CustomReward, WeightedReward, load_custom
from rewards.errors import RewardError
from rewards.process import PLACE, ProcessReward
from rewards.registry import REWARDS, options_name, options_of, reward_class
from rewards.rules import option_rule


def build_reward(
    spec: str, options: Mapping[str, Mapping] | None = None, device: torch.device | str = "cpu"
) -> WeightedReward:
    """Returns the reward that `spec` names, frozen, on `device`.

    Args:
        options: The keywords for the rewards' classes, by the name of the group of options. The options of rewards that
            the spec does not name are ignored.

    Returns:
        A WeightedReward with `.name`, `.differentiable`, `.terms` (name -> Reward), `.weights`, `.score_terms(…)`.

    Raises:
        RewardError: The spec, the name or the value of an option, or a file is wrong. The message is one line.
    """
    weights = parse_spec(spec)
    terms = {name: _load(name, options or {}) for name in weights}
    return WeightedReward(spec, terms, weights).to(device)


def as_reward(function) -> WeightedReward:
    """Wraps a callable `(images, prompts, metadata) -> scores [B]` in a WeightedReward, as `build_reward` returns."""
    if isinstance(function, WeightedReward):
        return function
    name = reward_name(function)
    return WeightedReward(name, {name: CustomReward(name, function)}, {name: 1.0})


def parse_spec(spec: str) -> dict[str, float]:
    """Turns `"hps:1.0,pkg.mod:fn:0.5"` into {"hps": 1.0, "pkg.mod:fn": 0.5}. Loads nothing.

    Raises:
        RewardError: A name is unknown or given twice, or a weight is 0 or not finite.
    """
    weights = {}
    for part in str(spec).split(","):
        name, weight = _parse_term(part.strip(), spec)
        if name in weights:
            raise RewardError(f"reward {spec!r} names {name!r} twice; give it once with the sum of the weights")
        weights[name] = weight
    return weights


def _parse_term(term: str, spec: str) -> tuple[str, float]:
    place, in_process, rest = term.rpartition("::")
    pieces = [piece.strip() for piece in rest.split(":")]
    weight = 1.0
    if len(pieces) > 1 and _is_number(pieces[-1]):
        weight = float(pieces.pop())
    if not math.isfinite(weight):
        raise RewardError(f"reward {spec!r}: the weight in {term!r} is not a finite number")
    if weight == 0:
        raise RewardError(f"reward {spec!r}: the weight in {term!r} is 0, so that it has no effect; leave it out")
    name = ":".join(pieces)
    is_custom = len(pieces) == 2 and pieces[1].isidentifier() and pieces[0].replace(".", "_").isidentifier()
    is_known = name in REWARDS or (is_custom and pieces[0] not in REWARDS)
    if not is_known or (in_process and not PLACE.fullmatch(place)):
        raise RewardError(
            f"reward {spec!r}: {term!r} is not known; allowed: {', '.join(sorted(REWARDS))} or "
            "package.module:callable, each perhaps with process:PATH/TO/python:: before it and :weight behind it"
            f"{did_you_mean(pieces[0], REWARDS)}"
        )
    return place + in_process + name, weight


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _load(name: str, options: Mapping[str, Mapping]) -> Reward:
    place, _, inner = name.rpartition("::")
    arguments = _arguments(inner, options) if inner in REWARDS else {}
    if place:
        return ProcessReward(name, arguments)
    return reward_class(name)(**arguments) if name in REWARDS else load_custom(name)


def _plain(value: Any) -> Any:
    """Returns a path as text, a number of numpy as one of Python, and any other value as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return value.item() if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0 else value


def _arguments(name: str, options: Mapping[str, Mapping]) -> dict[str, Any]:
    """Returns the keywords of a built-in reward's class.

    Raises:
        RewardError: The reward has no such option, or not with this value.
    """
    group, allowed = options_name(name), {option.name: option for option in options_of(name)}
    arguments = {key: _plain(value) for key, value in options.get(group, {}).items()}
    for key, value in arguments.items():
        if key not in allowed:
            hint = did_you_mean(key, allowed)
            raise RewardError(f"{group}.{key} is not an option of that reward; allowed: {', '.join(allowed)}{hint}")
        rule = option_rule(allowed[key])
        if not rule.accepts(value):
            raise RewardError(f"{group}.{key} = {value!r} must be {rule.wanted}{did_you_mean(value, rule.choices)}")
    return arguments
