"""The policy gradient of DDPO (Black et al. 2023, arXiv 2305.13301).

A step of a stochastic sampler is a draw from a policy,

    x[i+1] ~ N(a[i]·x[i] + b[i]·f(x[i], t[i], c), s[i]²),

so the gradient of its log-probability needs f alone, and the value of the reward is enough.
"""

import math
from collections import deque

import torch

from alignprop.method.chain import Sampler


def log_probability(
    sampler: Sampler, i: int, latents: torch.Tensor, model_output: torch.Tensor, next_latents: torch.Tensor
) -> torch.Tensor:
    """Returns log N(x[i+1]; a·x[i] + b·f, s²), averaged over the entries of x; float32 [B]. s[i] must not be 0.

    The authors' code takes this average too. It keeps the importance ratio near 1 whatever the size of the latents.
    """
    a, b, s = float(sampler.a[i]), float(sampler.b[i, i]), float(sampler.s[i, i])
    squares = ((next_latents - a * latents - b * model_output) / s).square()
    return (-squares / 2 - math.log(s) - math.log(2 * math.pi) / 2).flatten(1).mean(dim=1)


def clipped_loss(ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Returns -min(A·ratio, A·clip(ratio, 1 - clip_range, 1 + clip_range)), [B] (PPO, arXiv 1707.06347, eq. 7)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


class PromptStatistics:
    """Computes advantages from the newest rewards of each prompt, so that easy prompts do not dominate (sec. 5).

    Args:
        size: the number of rewards that are kept for each prompt. 0 keeps none, and all prompts share the epoch's mean
            and deviation.
        min_count: a prompt with fewer rewards than this uses the epoch's mean and deviation.
    """

    def __init__(self, size: int, min_count: int):
        self.size, self.min_count = size, min_count
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: list[str], rewards: torch.Tensor) -> torch.Tensor:
        """Keeps the rewards [n] of the prompts, then returns (reward - mean) / standard deviation, float64 [n]."""
        rewards = rewards.double().cpu()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.size)).append(reward)
        advantages = torch.empty_like(rewards)
        for j, prompt in enumerate(prompts):
            own = self.rewards[prompt]
            of = torch.tensor(own, dtype=torch.float64) if self.size and len(own) >= self.min_count else rewards
            advantages[j] = (rewards[j] - of.mean()) / (of.std(correction=0) + 1e-6)
        return advantages
