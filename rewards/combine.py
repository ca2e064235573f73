"""Combines several rewards into one, and wraps rewards that a user wrote."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from rewards.base import Reward, check_connected, check_rewards, check_shape
from rewards.errors import RewardError
from rewards.worker import Unusable, describe, find_callable

# Each function turns the weighted scores of the terms, [B] each, into one score [B].
COMBINATIONS = {
    "sum": sum,
    "mean": lambda scores: sum(scores) / len(scores),
    "min": lambda scores: torch.stack(scores).min(dim=0).values,  # so only the smallest term has a gradient
}


class WeightedReward(Reward):
    """Combines named terms, each times its weight, into one reward. `build_reward` returns it, even for a single term.

    Args:
        name: The spec that it was built from.
        terms: name -> Reward.
        weights: name -> factor.

    Attributes:
        combination: How the terms become one, a key of COMBINATIONS.
    """

    combination = "sum"

    def __init__(self, name: str, terms: Mapping[str, Reward], weights: Mapping[str, float]):
        super().__init__()
        self.name, self.terms, self.weights = name, dict(terms), dict(weights)
        # The list moves the terms between devices. A ModuleDict cannot, because it refuses names with dots.
        self.term_modules = nn.ModuleList(terms.values())
        self.differentiable = all(term.differentiable for term in terms.values())
        self.requires_grad_(False).eval()

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.combine(self.score_terms(images, prompts, metadata))

    def score_terms(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the scores [B] float32 of each term, before its weight.

        Raises:
            RewardError: Scores have a wrong shape, or a term lost the images' gradient or changed the images.
        """
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
        """Combines the result of `score_terms` into one score [B], so that the terms are computed only once.

        `scores` may hold further entries, which are ignored.
        """
        return COMBINATIONS[self.combination]([weight * scores[name] for name, weight in self.weights.items()])


def try_reward(reward: WeightedReward, images: torch.Tensor, prompts, metadata, needs_gradient: bool) -> None:
    """Scores some pictures and computes their gradient if needed, to find a broken reward before a run depends on it.

    Raises:
        RewardError: The scores or the gradient are useless for training.
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
    """A user's own callable: `function(images, prompts, metadata) -> scores [B]`, or (scores, anything).

    What comes with the scores is ignored, such as the metadata that TRL's trainers expect.

    Raises:
        RewardError: The callable raised an error. The message has the error's type, text and place.
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
    """Returns the reward `package.module:callable`: a function, a module, or a class that is built without arguments.

    Raises:
        RewardError: The reward cannot be imported, built or called. The message gives the reason.
    """
    try:
        return CustomReward(spec, find_callable(spec))
    except Unusable as error:
        raise RewardError(f"reward {spec!r}: {error}") from error.__cause__
