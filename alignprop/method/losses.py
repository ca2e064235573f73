"""The losses: functions from the rewards [B] of B samples to their losses [B]. A lower loss is better."""

from collections.abc import Callable

import torch


def maximise(rewards: torch.Tensor, target: float | None) -> torch.Tensor:
    """-r, which makes the reward as high as possible. `target` is not used."""
    return -rewards


def towards_target(rewards: torch.Tensor, target: float) -> torch.Tensor:
    """|r - target|, AlignProp's aesthetic loss. The gradient changes its sign when a sample is past the target."""
    return (rewards - target).abs()


def ceiling(rewards: torch.Tensor, target: float) -> torch.Tensor:
    """max(0, target - r). A sample above the ceiling gets no gradient."""
    return (target - rewards).clamp(min=0)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "maximise": maximise,
    "target": towards_target,
    "ceiling": ceiling,
}
