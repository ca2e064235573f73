"""Several rewards as one, and rewards that a person wrote himself."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from rewards.base import Reward, check_connected, check_rewards, check_shape, did_you_mean
from rewards.errors import RewardError
from rewards.towers import first_line

# From the weighted scores of the terms, [B] each, to one [B].
COMBINATIONS = {
    "sum": sum,
    "mean": lambda scores: sum(scores) / len(scores),
    "min": lambda scores: torch.stack(scores).min(dim=0).values,  # so only the smallest has a gradient
}


class WeightedReward(Reward):
    """Named terms, each times its weight, as one reward; what `build_reward` returns, also for a single term.

    name: the spec it was built from. terms: name -> Reward. weights: name -> factor. combination: a key of
    COMBINATIONS, how the terms become one.
    """

    combination = "sum"

    def __init__(self, name: str, terms: Mapping[str, Reward], weights: Mapping[str, float]):
        super().__init__()
        self.name, self.terms, self.weights = name, dict(terms), dict(weights)
        # Names hold dots, which ModuleDict refuses; the list is what moves the terms between devices.
        self.term_modules = nn.ModuleList(terms.values())
        self.differentiable = all(term.differentiable for term in terms.values())
        self.requires_grad_(False).eval()

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.combine(self.score_terms(images, prompts, metadata))

    def score_terms(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> dict[str, torch.Tensor]:
        """Each term's own scores [B] float32, before its weight. Raises: RewardError for a wrong shape, or a term
        that lost the images' gradient, or changed the images."""
        scores, version = {}, images._version
        for name, term in self.terms.items():
            scores[name] = term(images, prompts, metadata)
            if images._version != version:
                raise RewardError(
                    f"reward {name!r} changes the images in place, which others still have to see; let it work on "
                    "images.clone()"
                )
            check_shape(scores[name], images, term)
            check_connected(scores[name], images, term)
        return {name: score.to(images.device, torch.float32) for name, score in scores.items()}

    def combine(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One score [B] of `score_terms`' answer, to have both for the price of one; `scores` may hold others too."""
        return COMBINATIONS[self.combination]([weight * scores[name] for name, weight in self.weights.items()])


def try_reward(reward: WeightedReward, images: torch.Tensor, prompts, metadata, needs_gradient: bool) -> None:
    """Scores some pictures, and follows their gradient, so that a broken reward is found before a run depends on it.

    Raises: RewardError.
    """
    images = images.clone().requires_grad_(needs_gradient)
    with torch.set_grad_enabled(needs_gradient):
        terms = reward.score_terms(images, prompts, metadata)
        total = reward.combine(terms)
    for name, scores in terms.items():
        check_rewards(scores, images, name, needs_gradient=False)
    check_rewards(total, images, reward, needs_gradient)
    if needs_gradient:
        (gradient,) = torch.autograd.grad(total.sum(), images)
        if not gradient.isfinite().all():
            raise RewardError(
                f"reward {reward.name!r} has finite scores, but a gradient that is not finite; a square root, a "
                "logarithm or a division at 0 may be the cause"
            )
        if not gradient.any():
            raise RewardError(
                f"reward {reward.name!r} has a gradient of exactly 0 in every pixel of {len(images)} pictures: nothing "
                "would be learned from it; rounding, a comparison, a saturated clamp or a factor of 0 may be the cause"
            )


class CustomReward(Reward):
    """A person's own callable: `function(images, prompts, metadata) -> scores [B]`, or (scores, anything).

    What comes with the scores, such as the metadata that TRL's trainers want beside them, is not looked at.

    Raises: RewardError with type, text and place of whatever the callable raises.
    """

    def __init__(self, name: str, function: Callable):
        super().__init__()
        self.name, self.function = name, function
        self.differentiable = bool(getattr(function, "differentiable", True))

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        try:
            answer = self.function(images, prompts, metadata)
        except (RewardError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RewardError(f"reward {self.name!r} failed: {describe(error, self.function)}") from error
        return answer[0] if isinstance(answer, tuple) and len(answer) == 2 else answer


def load_custom(spec: str) -> CustomReward:
    """The reward at `package.module:callable`: a function, a module, or a class that is built without arguments.

    The current directory is searched after the installed packages. Raises: RewardError with the reason.
    """
    module_name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Whatever the module's own code raises is the reason to show; a script may even exit.
        raise RewardError(f"reward {spec!r}: cannot import {module_name!r}: {describe(error)}") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise RewardError(f"reward {spec!r}: {module_name!r} has no {attribute!r}{did_you_mean(attribute, public)}")
    function = getattr(module, attribute)
    if inspect.isclass(function):
        try:
            function = function()
        except Exception as error:
            raise RewardError(
                f"reward {spec!r}: {attribute}() without arguments failed: {describe(error, function)}"
            ) from error
    if not callable(function):
        raise RewardError(f"reward {spec!r}: {attribute!r} is a {type(function).__name__}, which cannot be called")
    return CustomReward(spec, function)


def describe(error: BaseException, function=None) -> str:
    """Type, text and place of an error, in one line.

    The place is the innermost one in the file that defines `function`, the reward that a person wrote, or outside
    of Python's own import where there is none; errors are mostly raised deep inside torch.
    """
    module = sys.modules.get(getattr(function, "__module__", "") or "")
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if f.filename not in (__file__, importlib.__file__) and f.filename[0] != "<"]
    own = [f for f in frames if f.filename == getattr(module, "__file__", None)] or frames
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"
