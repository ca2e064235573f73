"""The base class of rewards, and the checks of a reward's scores before a training run trusts them."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from rewards.errors import RewardError


class Reward(nn.Module):
    """Scores images for their prompts. Higher is better.

    A subclass implements `score`. A reward is never trained: it is frozen and stays in evaluation mode.
    """

    differentiable: bool = True
    plannable: bool = False  # True: it can run on tensors without data, because it never looks at their values.

    @classmethod
    def skeleton(cls, options: Mapping[str, Any], tower_config: "TowerConfig") -> "Reward":
        """Returns a reward of the same shapes on torch's meta device, to plan a run's memory without loading files.

        A reward with towers builds them. Any other reward is small compared with the model, and a `BlankReward` stands
        in for it. Whatever `tower_config` raises is passed on.

        Args:
            options: All arguments of the constructor.
            tower_config: A function of (a model's name, the option that names it, "clip", "siglip", "blip",
                "qwen2_vl", "dinov2" and so on). It returns the keywords of the model's `transformers.CLIPConfig`,
                `SiglipConfig` and so on. For the kind "vlm", any image-text model, they are those of
                `AutoConfig.for_model`. Of several kinds, in a tuple, the model must be one.
        """
        return BlankReward()

    def forward(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """Returns scores [B] float32 of images [B, 3, H, W] in [0, 1], given one prompt (and metadata dict) per image.

        It runs in float32 even inside `torch.autocast`, because half precision visibly disturbs a reward's gradient. A
        reward that offers a lower precision has a `dtype` option. Run the backward pass outside of autocast, as PyTorch
        asks for every backward pass. Inside, its matrix products are cast again.
        """
        if len(prompts) != len(images):
            raise ValueError(f"got {len(images)} images but {len(prompts)} prompts; each image needs its own")
        kind = images.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return self.score(images.float(), list(prompts), metadata)

    def score(
        self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict[str, Any]] | None
    ) -> torch.Tensor:
        """Does the work of `forward`. The images are float32 and autocast is switched off."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Reward":
        super().train(False)
        return self


TowerConfig = Callable[[str, str, str | tuple[str, ...]], dict[str, Any]]


class BlankReward(Reward):
    """Stands in for a reward that may look at values, such as a user's own, or that is small next to the others."""

    plannable = True

    def score(
        self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict[str, Any]] | None
    ) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


def require_differentiable(reward: Any) -> None:
    """Refuses a reward that declares `differentiable = False`. Needs no image, so it can run before loading a model.

    Raises:
        RewardError: The reward declares it.
    """
    if not getattr(reward, "differentiable", True):
        raise RewardError(
            f"reward {reward_name(reward)!r} says differentiable=False, but the estimator in use sends a gradient "
            "through the reward; use a differentiable reward or an estimator that needs no gradient"
        )


def check_rewards(scores: Any, images: torch.Tensor, reward: Any, needs_gradient: bool) -> None:
    """Refuses scores that are useless for training. It is meant for the first batch of a run.

    Args:
        scores: What `reward` returned for the images. It must be a finite floating tensor [B].
        images: [B, 3, H, W].
        needs_gradient: The scores must also depend on `images` through autograd. The images then require a gradient.

    Raises:
        RewardError: The scores are refused. The message is one line that names the reward and says what is wrong.
    """
    if needs_gradient:
        require_differentiable(reward)
    check_shape(scores, images, reward)
    bad = (~torch.isfinite(scores.detach())).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(f"sample {i}: {scores[i].item()}" for i in bad[:8]) + (", …" if len(bad) > 8 else "")
        raise RewardError(f"reward {reward_name(reward)!r} returned non-finite scores ({shown})")
    if needs_gradient:
        assert images.requires_grad, "check_rewards(needs_gradient=True) wants images that require a gradient"
        if not _depends_on(scores, images):
            raise RewardError(_no_gradient(reward))


def check_shape(scores: Any, images: torch.Tensor, reward: Any) -> None:
    """Raises a RewardError unless the scores are a floating tensor [B] for images [B, 3, H, W]."""
    name = reward_name(reward)
    if not isinstance(scores, torch.Tensor):
        raise RewardError(f"reward {name!r} returned {type(scores).__name__}, expected a torch.Tensor [B]")
    if tuple(scores.shape) != (len(images),):
        raise RewardError(
            f"reward {name!r} returned shape {list(scores.shape)}, expected [{len(images)}]: one score per image"
        )
    if not scores.is_floating_point():
        raise RewardError(f"reward {name!r} returned {scores.dtype}, expected a floating dtype")


def check_connected(scores: torch.Tensor, images: torch.Tensor, reward: Any) -> None:
    """Raises a RewardError if one term of a sum lost the autograd graph of images that require a gradient."""
    wanted = torch.is_grad_enabled() and images.requires_grad and getattr(reward, "differentiable", True)
    if wanted and not scores.requires_grad:
        raise RewardError(_no_gradient(reward))


def reward_name(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` with the nearest allowed word, or an empty text if no word is near."""
    nearest = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _no_gradient(reward: Any) -> str:
    return (
        f"reward {reward_name(reward)!r} returned scores that do not depend on the images through autograd, so there "
        "is no gradient to follow; look for .detach(), torch.no_grad(), .item() or numpy; if it has "
        "none by design, set differentiable = False"
    )


def _depends_on(scores: torch.Tensor, images: torch.Tensor) -> bool:
    """Returns whether `images` is an ancestor of `scores` in the autograd graph.

    `scores.requires_grad` does not tell, because it is also true if only a reward's own weights require a gradient.
    Walking the graph costs almost nothing compared with a backward pass.
    """
    target = torch.autograd.graph.get_gradient_edge(images).node
    stack, seen = [scores.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is target:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return False
