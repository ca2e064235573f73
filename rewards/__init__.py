"""Rewards: `reward(images [B, 3, H, W] in [0, 1], prompts, metadata) -> scores [B]`, higher is better.

A reward is named in the config by a spec:

    "hps"                                   one of REWARDS
    "hps:1.0,aesthetic:0.1"                 a weighted sum
    "my_package.my_module:my_reward"        a function, module or class of yours, importable from the current directory
    "my_module:my_reward:0.5,clip:10"       the same with a weight, in a sum
"""

import inspect
import math
from collections.abc import Mapping

import torch

from rewards.aesthetic import AestheticReward
from rewards.base import Reward, RewardError, check_rewards, did_you_mean, require_differentiable, reward_name
from rewards.clip import ClipReward
from rewards.colour import ColourReward
from rewards.combine import CustomReward, WeightedReward, load_custom, try_reward
from rewards.count import CountReward, HardCountReward, TinyCountReward
from rewards.hps import HPSReward
from rewards.imagereward import ImageReward
from rewards.jpeg import JpegCompressibility, JpegIncompressibility, JpegProxy
from rewards.pickscore import PickScoreReward
from rewards.siglip import SiglipReward

# Importing these costs nothing: each fetches transformers or hpsv2 when it is built.
REWARDS = {
    "aesthetic": AestheticReward,
    "hps": HPSReward,
    "pickscore": PickScoreReward,
    "imagereward": ImageReward,
    "clip": ClipReward,
    "siglip": SiglipReward,
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
    "jpeg_proxy": JpegProxy,
    "count": CountReward,
    "count_hard": HardCountReward,
    "tiny_count": TinyCountReward,
    "colour": ColourReward,
}
# Rewards that share the options of another name.
OPTIONS_OF = {
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "jpeg_proxy": "jpeg",
    "count_hard": "count",
}

__all__ = [
    "OPTIONS_OF",
    "REWARDS",
    "Reward",
    "RewardError",
    "WeightedReward",
    "as_reward",
    "build_reward",
    "check_rewards",
    "parse_spec",
    "require_differentiable",
    "try_reward",
]


def build_reward(
    spec: str, options: Mapping[str, Mapping] | None = None, device: torch.device | str = "cpu"
) -> WeightedReward:
    """The reward that `spec` names, frozen, on `device`.

    options: keywords for the rewards' classes, per name in REWARDS, or its name in OPTIONS_OF; those of rewards that
    the spec does not name are unused.
    Returns a WeightedReward: `.name`, `.differentiable`, `.terms` (name -> Reward), `.weights`, `.score_terms(…)`.
    Raises: RewardError, one line, for anything wrong with the spec, an option, or a file.
    """
    weights = parse_spec(spec)
    options = {name: (options or {}).get(OPTIONS_OF.get(name, name), {}) for name in weights}
    for name in weights:
        if name in REWARDS:
            _check_options(name, options[name])
    terms = {name: REWARDS[name](**options[name]) if name in REWARDS else load_custom(name) for name in weights}
    return WeightedReward(spec, terms, weights).to(device)


def as_reward(function) -> WeightedReward:
    """A callable `(images, prompts, metadata) -> scores [B]` as what `build_reward` returns."""
    if isinstance(function, WeightedReward):
        return function
    name = reward_name(function)
    return WeightedReward(name, {name: CustomReward(name, function)}, {name: 1.0})


def parse_spec(spec: str) -> dict[str, float]:
    """`"hps:1.0,pkg.mod:fn:0.5"` -> {"hps": 1.0, "pkg.mod:fn": 0.5}. Loads nothing. Raises: RewardError."""
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


def _check_options(name: str, options: Mapping) -> None:
    allowed = inspect.signature(REWARDS[name]).parameters
    for key in options:
        if key not in allowed:
            hint, field = did_you_mean(key, allowed), f"{OPTIONS_OF.get(name, name)}.{key}"
            raise RewardError(f"{field} is not an option of that reward; allowed: {', '.join(allowed)}{hint}")
