"""A reward in a process of its own, which may be in another environment and on another GPU.

It is named "process:PATH/TO/python::package.module:callable", or with a device "process:PATH/TO/python@cuda:1::…".
worker.py is the program of that process, and connection.py the way to it.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rewards.base import Reward
from rewards.connection import Connection, Died

PLACE = re.compile(r"process:(.+?)(?:@(cpu|cuda|cuda:\d+))?")


class ProcessReward(Reward):
    """A reward that another Python interpreter computes. If its process dies, it is started again, but only once.

    Args:
        name: `process:PATH/TO/python::REWARD`, perhaps with `@cpu`, `@cuda` or `@cuda:N` behind the path. REWARD is
            `package.module:callable` or a built-in reward. By default it runs on the device of the pictures, or on the
            CPU if the other torch has no CUDA.
        options: The keywords of a built-in reward's class.

    Raises:
        RewardError: The interpreter, its torch or the reward cannot be used. Scoring raises it as well, for an error
            inside the reward, for a second death, and after TIMEOUT.
    """

    def __init__(self, name: str, options: Mapping[str, Any]):
        super().__init__()
        place, _, reward = name.rpartition("::")
        python, device = PLACE.fullmatch(place).groups()
        self.name, self._is_second = name, False
        self._start = partial(Connection, name, python, reward=reward, options=dict(options), device=device)
        self.worker = self._start()
        self.differentiable = self.worker.differentiable

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        batch = {
            "shape": list(images.shape),
            "stride": torch.empty_like(images, device="meta").stride(),
            "device": str(images.device),
            "prompts": prompts,
            "metadata": metadata,
            "gradient": self.differentiable and torch.is_grad_enabled() and images.requires_grad,
            "seed": torch.initial_seed(),
        }
        return _Scores.apply(images, self, batch)

    def answer(self, images: torch.Tensor, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the worker's answer to a batch, for images [B, 3, H, W] float32."""
        return self._twice(lambda: self.worker.score(images, batch))

    def gradient(self, images: torch.Tensor, batch: dict[str, Any], weights: list[float]) -> torch.Tensor:
        """Returns ∂(weights · scores)/∂pixels, [B, 3, H, W], for the scores of a batch."""

        def work() -> torch.Tensor:
            if self.worker.holds is not batch:  # it is a new process, or has seen another batch since
                self.worker.score(images, batch)
            return self.worker.backward(images, weights)

        return self._twice(work)

    def _twice(self, work: Callable[[], Any]) -> Any:
        """Returns what `work` returns. If the worker dies for the first time, it calls `work` again with a new one."""
        try:
            return work()
        except Died as death:
            if self._is_second:
                raise
            print(f"warning: {death}; it is started again, once, and gets its batch again", file=sys.stderr)
        self._is_second, self.worker = True, self._start()
        return work()


class _Scores(torch.autograd.Function):
    """Scores [B] of images [B, 3, H, W]; the gradient is computed by the worker when it is needed."""

    @staticmethod
    def forward(ctx, images: torch.Tensor, reward: ProcessReward, batch: dict[str, Any]) -> torch.Tensor:
        ctx.save_for_backward(images)
        ctx.reward, ctx.batch = reward, batch
        answer = reward.answer(images, batch)
        scores = torch.tensor(answer["scores"], device=images.device)
        if not answer["has_gradient"]:
            ctx.mark_non_differentiable(scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, weights: torch.Tensor) -> tuple:
        (images,) = ctx.saved_tensors
        return ctx.reward.gradient(images, ctx.batch, weights.tolist()), None, None
