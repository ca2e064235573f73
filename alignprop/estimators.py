"""Which network calls carry gradient: one row of data for each published way of back-propagating a reward.

An estimator is a function `(num_steps, num_samples, generator) -> GradientPlan`. The plan is drawn for the whole
global batch before the rollout starts, so it can be printed and tested, and every process takes its own columns:
neither the number of processes nor the micro-batch size changes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class GradientPlan:
    """The part of the sampling chain that the sweep differentiates, for N steps and B samples.

    Attributes:
        active: bool [N, B]; the network call of step i carries gradient for sample b.
        coupling: float [N, B]; how much of ∂f/∂x at an active step joins the adjoint (γ; 1 is exact, 0 detaches).
        weight: float [N, B], not zero where active; multiplies an active step's gradient (w; 1 is exact).
    """

    active: torch.Tensor
    coupling: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def exact(cls, active: torch.Tensor) -> "GradientPlan":
        """Plain back-propagation through the active calls: γ = w = 1."""
        ones = torch.ones(active.shape)
        return cls(active, ones, ones)

    def select(self, samples) -> "GradientPlan":
        """The plan of some samples (int [b], columns of this one)."""
        return GradientPlan(self.active[:, samples], self.coupling[:, samples], self.weight[:, samples])

    @property
    def first_active(self) -> int:
        """The lowest active step of any sample; N when there is none."""
        steps = self.active.any(dim=1).nonzero()
        return int(steps[0]) if len(steps) else len(self.active)


Estimator = Callable[[int, int, torch.Generator], GradientPlan]


def stratified_uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    """n draws from U[0, 1), one in each of n equal strata, in random order; float64 [n].

    Each draw alone is uniform, and together they cover the range evenly, so an update averages over many
    truncation lengths instead of gambling on a few.
    """
    return (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)) / n


def none(num_steps, num_samples, generator=None) -> GradientPlan:
    """No gradient at all: evaluation."""
    return GradientPlan.exact(torch.zeros(num_steps, num_samples, dtype=torch.bool))


def full(num_steps, num_samples, generator=None) -> GradientPlan:
    """Back-propagation through every step."""
    return GradientPlan.exact(torch.ones(num_steps, num_samples, dtype=torch.bool))


def truncated(num_steps, num_samples, generator=None, *, first: int) -> GradientPlan:
    """Gradient from sampler step `first` on: the last K = N - first steps.

    DRaFT-K (Clark et al. 2023, arXiv 2309.17400, sec. 3); AlignProp's K = 1 (arXiv 2310.03739, sec. 4).
    """
    active = torch.arange(num_steps)[:, None] >= first
    return GradientPlan.exact(active.expand(num_steps, num_samples))


def randomized(num_steps, num_samples, generator, *, minmax: tuple[int, int]) -> GradientPlan:
    """AlignProp's randomized truncation: each trajectory draws ONE first step, uniform over minmax[0] … minmax[1]-1.

    (0, N) draws K = 1 … N, so that every trajectory has at least its last step. arXiv 2310.03739, sec. 4, eq. 4.
    The draws of a batch are stratified.
    """
    low, high = minmax
    first = low + (stratified_uniform(num_samples, generator) * (high - low)).long()
    return GradientPlan.exact(torch.arange(num_steps)[:, None] >= first)


def per_step(num_steps, num_samples, generator, *, minmax: tuple[int, int]) -> GradientPlan:
    """A new truncation step at EVERY sampler step: step i is active where a draw from minmax[0] … minmax[1] is <= i.

    This is what AlignProp's released code and TRL's trainer do instead of the paper's one draw per trajectory: for
    (0, 50), step i keeps its gradient with probability (i + 1) / 51, independently of the other steps. Kept under
    its own name to reproduce their results; both ends of the range are included, as there. Here each sample has
    draws of its own, there the samples of a micro-batch share them: the same expectation with less variance.
    """
    low, high = minmax
    draws = torch.randint(low, high + 1, (num_steps, num_samples), generator=generator)
    return GradientPlan.exact(draws <= torch.arange(num_steps)[:, None])


ESTIMATORS = {
    "full": lambda first, minmax: full,
    "truncated": lambda first, minmax: partial(truncated, first=first),
    "randomized": lambda first, minmax: partial(randomized, minmax=minmax),
    "per_step": lambda first, minmax: partial(per_step, minmax=minmax),
    "none": lambda first, minmax: none,
}


def build_estimator(name: str, first: int, minmax: tuple[int, int]) -> Estimator:
    """The estimator called `name`, a key of ESTIMATORS.

    Args:
        first: `trunc_backprop_timestep`, 0 … N-1; used by `truncated`.
        minmax: `truncated_backprop_minmax`, 0 <= minmax[0] < minmax[1] <= N; used by `randomized` and `per_step`.
    """
    return ESTIMATORS[name](first, tuple(minmax))
