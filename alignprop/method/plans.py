"""What an estimator decides before the rollout: which part of the sampling chain the sweep differentiates, and how."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class GradientPlan:
    """The part of the sampling chain that the sweep differentiates, for N steps and B samples.

    Attributes:
        active: bool [N, B]; the network call of step i carries gradient for sample b.
        coupling: float [N, B]; how much of ∂f/∂x at an active step joins the adjoint (γ; 1 is exact, 0 detaches).
        weight: float [N, B], not zero where active; multiplies an active step's gradient (w; 1 is exact).
        exit_step: int [B]; the step whose x̂0 the reward sees, where the chain is left; N: the chain's end, x[N].
        copies: further x̂0 of each sample, from its clean latents re-noised to the level of its exit step. Then all
            samples leave the chain, at the same step, and no step before that is active.
    """

    active: torch.Tensor
    coupling: torch.Tensor
    weight: torch.Tensor
    exit_step: torch.Tensor
    copies: int = 0

    @classmethod
    def exact(cls, active: torch.Tensor, **changes) -> "GradientPlan":
        """Plain back-propagation through the active calls, γ = w = 1 and no early exit, but for the `changes`."""
        ones, end = torch.ones(active.shape), torch.full(active.shape[1:], len(active))
        return cls(**{"active": active, "coupling": ones, "weight": ones, "exit_step": end} | changes)

    def select(self, samples) -> "GradientPlan":
        """The plan of some samples (int [b], columns of this one)."""
        columns = (t[:, samples] for t in (self.active, self.coupling, self.weight))
        return GradientPlan(*columns, self.exit_step[samples], self.copies)

    def with_copies(self) -> "GradientPlan":
        """The plan of the samples and their copies, next to one another, as samples of their own."""
        return replace(self.select(self.repeated), copies=0)

    def repeat(self, rows: list) -> list:
        """Each of B rows once for its sample and once for each copy of it, next to one another: B·(1 + copies)."""
        return [rows[sample] for sample in self.repeated]

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of values [B·(1 + copies), ...] over each sample and its copies, [B, ...]."""
        return values.unflatten(0, (-1, 1 + self.copies)).mean(dim=1)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Their sum, likewise."""
        return values.unflatten(0, (-1, 1 + self.copies)).sum(dim=1)

    @property
    def repeated(self) -> torch.Tensor:
        """The sample that each of the samples and their copies is made of, int [B·(1 + copies)]."""
        return torch.arange(len(self.exit_step)).repeat_interleave(1 + self.copies)

    @classmethod
    def short(cls, num_steps: int, num_samples: int, copies: int = 0) -> "GradientPlan":
        """All of a few steps active; with copies, which ask for it, the last step alone, where all samples leave."""
        active = torch.ones(num_steps, num_samples, dtype=torch.bool)
        if not copies:
            return cls.exact(active)
        active[:-1] = False
        return cls.exact(active, exit_step=torch.full((num_samples,), num_steps - 1), copies=copies)

    @property
    def leaves_early(self) -> bool:
        """Whether the reward sees x̂0 of a step, for any sample."""
        return bool((self.exit_step < len(self.active)).any())

    @property
    def first_active(self) -> int:
        """The lowest active step of any sample; N when there is none."""
        steps = self.active.any(dim=1).nonzero()
        return int(steps[0]) if len(steps) else len(self.active)


def stratified_uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    """n draws from U[0, 1), one in each of n equal strata, in random order; float64 [n].

    Each draw alone is uniform, and together they cover the range evenly, so an update averages over many
    truncation lengths instead of gambling on a few.
    """
    return (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)) / n


def stratified_integers(low: int, high, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform over low … high-1, stratified over the samples; int64 [B]. `high` may differ between samples, [B]."""
    return low + (stratified_uniform(num_samples, generator) * (torch.as_tensor(high) - low)).long()


def stratified_pairs(num_steps: int, num_samples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """k < j, uniform over the pairs of steps and stratified over the samples; int64 [B] each. For num_steps >= 2."""
    first, second = torch.triu_indices(num_steps, num_steps, offset=1)
    pair = stratified_integers(0, len(first), num_samples, generator)
    return first[pair], second[pair]


def late_biased(low, high, count, num_steps: int, bias: float, generator: torch.Generator) -> torch.Tensor:
    """`count` distinct steps of low … high-1 for each sample; bool [N, B].

    Drawn one after the other with probability ~ (i - low + 1)^bias, which prefers the late steps (FlowBP, arXiv
    2606.11075). Adding Gumbel noise to the logarithms and taking the largest is the same draw (Kool et al. 2019,
    arXiv 1903.06059).

    Args:
        low, high, count: int [B].
    """
    place = torch.arange(num_steps)[:, None] - low + 1
    inside = (place >= 1) & (torch.arange(num_steps)[:, None] < high)
    uniform = torch.rand(inside.shape, generator=generator, dtype=torch.float64)
    score = bias * place.clamp(min=1).double().log() - (-uniform.log()).log()
    rank = score.masked_fill(~inside, -torch.inf).argsort(dim=0, descending=True).argsort(dim=0)
    return inside & (rank < count)
