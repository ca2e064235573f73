"""Builds a reward from its spec, such as "hps:1,aesthetic:0.1"."""

import math
from collections.abc import Mapping

import torch

from rewards.base import Reward, did_you_mean, reward_name
from rewards.combine import CustomReward, WeightedReward, load_custom
from rewards.errors import RewardError
from rewards.registry import REWARDS, options_name, options_of, reward_class


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
        RewardError: The spec, an option or a file is wrong. The message is one line.
    """
    weights = parse_spec(spec)
    terms = {name: _build(name, options or {}) if name in REWARDS else load_custom(name) for name in weights}
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
    pieces = [piece.strip() for piece in term.split(":")]
    weight = 1.0
    if len(pieces) > 1 and _is_number(pieces[-1]):
        weight = float(pieces.pop())
    if not math.isfinite(weight):
        raise RewardError(f"reward {spec!r}: the weight in {term!r} is not a finite number")
    if weight == 0:
        raise RewardError(f"reward {spec!r}: the weight in {term!r} is 0, so that it has no effect; leave it out")
    name = ":".join(pieces)
    is_custom = len(pieces) == 2 and pieces[1].isidentifier() and pieces[0].replace(".", "_").isidentifier()
    if name not in REWARDS and (not is_custom or pieces[0] in REWARDS):
        raise RewardError(
            f"reward {spec!r}: {term!r} is not known; allowed: {', '.join(sorted(REWARDS))} or "
            f"package.module:callable, each with :weight behind it{did_you_mean(pieces[0], REWARDS)}"
        )
    return name, weight


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _build(name: str, options: Mapping[str, Mapping]) -> Reward:
    arguments, allowed = options.get(options_name(name), {}), [option.name for option in options_of(name)]
    for key in arguments:
        if key not in allowed:
            hint, field = did_you_mean(key, allowed), f"{options_name(name)}.{key}"
            raise RewardError(f"{field} is not an option of that reward; allowed: {', '.join(allowed)}{hint}")
    return reward_class(name)(**arguments)
