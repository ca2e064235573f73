"""How near a picture is to one colour.

This is the simplest differentiable reward. Guidance tutorials call it the "blue loss".
"""

from collections.abc import Sequence
from typing import Annotated

import torch

from rewards.base import Reward


class ColourReward(Reward):
    """Minus the mean absolute difference between a picture's pixels and one colour, in [-1, 0]. Prompts are ignored.

    Args:
        target: Red, green and blue that pictures are to have, each from 0 to 1.
    """

    def __init__(self, target: Annotated[tuple[float, float, float], (0, 1)] = (0.1, 0.9, 0.5)):
        super().__init__()
        self.register_buffer("target", torch.tensor(target, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return -(images - self.target).abs().mean(dim=(1, 2, 3))
