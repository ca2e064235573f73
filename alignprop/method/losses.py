"""From rewards to the loss of each sample. Shapes: rewards [B] -> losses [B]; lower is better."""

from collections.abc import Callable

import torch


def maximise(rewards: torch.Tensor, target: float) -> torch.Tensor:
    """The reward as high as it gets; `target` is not used."""
    return -rewards


def towards_target(rewards: torch.Tensor, target: float) -> torch.Tensor:
    """|r - target|: the gradient turns round once a sample is past the target (AlignProp's aesthetic loss)."""
    return (rewards - target).abs()


def ceiling(rewards: torch.Tensor, target: float) -> torch.Tensor:
    """max(0, target - r): a sample that has reached the ceiling is left alone."""
    return (target - rewards).clamp(min=0)


LOSSES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "maximise": maximise,
    "target": towards_target,
    "ceiling": ceiling,
}
