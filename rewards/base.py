"""What a reward is, and what is checked of its scores before a training run trusts them."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from rewards.errors import RewardError


class Reward(nn.Module):
    """Scores images against their prompts; higher is better.

    A subclass implements `score`. It is a frozen judge, never a thing to train: it stays in evaluation mode.
    """

    differentiable: bool = True
    plannable: bool = False  # it computes on tensors without data, whatever their values

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: "TowerConfig") -> "Reward":
        """A reward of the same shapes on torch's meta device, without files: what planning a run's memory needs.

        A reward with towers makes them; any other is small beside the model, and a `BlankReward` stands for it.

        options: of the constructor, all of them.
        tower_config: (a model's name, the option that names it, "clip", "siglip" or "blip") -> the keywords of its
        `transformers.CLIPConfig`, `SiglipConfig` or `BlipConfig`.
        Raises: whatever `tower_config` raises.
        """
        return BlankReward()

    def forward(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> torch.Tensor:
        """Scores [B] float32 of images [B, 3, H, W] in [0, 1], one prompt (and one metadata dict) per image.

        Runs in float32 even inside `torch.autocast`: half precision visibly disturbs a reward's gradient. A
        reward that offers a lower precision says so in its own `dtype` option. The backward pass belongs outside
        of autocast, as PyTorch asks for any: inside, its matrix products would be cast again.
        """
        if len(prompts) != len(images):
            raise ValueError(f"got {len(images)} images but {len(prompts)} prompts; each image needs its own")
        kind = images.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return self.score(images.float(), list(prompts), metadata)

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        """As `forward`, with float32 images and autocast switched off."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Reward":
        return super().train(False)


TowerConfig = Callable[[str, str, str], dict]


class BlankReward(Reward):
    """In the place of a reward that may look at values, as a user's own, or that is small beside the others."""

    plannable = True

    def score(self, images: torch.Tensor, prompts, metadata) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


def require_differentiable(reward: Any) -> None:
    """Refuse a reward that declares `differentiable = False`; needs no image, so it can run before any model.

    Raises: RewardError.
    """
    if not getattr(reward, "differentiable", True):
        raise RewardError(
            f"reward {reward_name(reward)!r} says differentiable=False, but the estimator in use sends a gradient "
            "through the reward; use a differentiable reward or an estimator that needs no gradient"
        )


def check_rewards(scores: Any, images: torch.Tensor, reward: Any, needs_gradient: bool) -> None:
    """Refuse scores that would train on nonsense; meant for the first batch of a run.

    scores: what `reward` returned for images [B, 3, H, W]; must be a finite floating tensor [B].
    needs_gradient: the scores must also depend, through autograd, on `images`, which then require a gradient.

    Raises: RewardError with one line that names the reward and says what is wrong.
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
    """Refuse anything but a floating tensor [B] for images [B, 3, H, W]. Raises: RewardError."""
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
    """Refuse one term of a sum whose scores lost the graph of images that want a gradient. Raises: RewardError."""
    wanted = torch.is_grad_enabled() and images.requires_grad and getattr(reward, "differentiable", True)
    if wanted and not scores.requires_grad:
        raise RewardError(_no_gradient(reward))


def reward_name(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest allowed word, or nothing where none is near."""
    nearest = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _no_gradient(reward: Any) -> str:
    return (
        f"reward {reward_name(reward)!r} returned scores that do not depend on the images through autograd, so there "
        "is no gradient to follow; look for .detach(), torch.no_grad(), .item() or numpy, or set differentiable = False"
    )


def _depends_on(scores: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether `images` is an ancestor of `scores`. Walks the graph, which costs nothing beside a backward pass
    and is needed because scores.requires_grad is also true when only a reward's own weights require one."""
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
