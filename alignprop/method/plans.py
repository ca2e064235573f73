"""The plan that an estimator makes before the rollout: which part of the chain the sweep differentiates, and how."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class GradientPlan:
    """The part of the sampling chain that the sweep differentiates, for N steps and B samples.

    Attributes:
        active: bool [N, B]; whether the network call of step i carries gradient for sample b.
        coupling: γ, float [N, B]; how much of ∂f/∂x at an active step joins the adjoint. 1 is exact, 0 detaches.
        weight: w, float [N, B], not zero at active steps; multiplies an active step's gradient. 1 is exact.
        exit_step: int [B]; the step at which the sample leaves the chain, so that the reward sees this step's x̂0. N
            means that it does not leave early, so that the reward sees x[N].
        copies: the number of further x̂0 of each sample. They start from its clean latents, re-noised to the level of
            its exit step. If there are copies, all samples leave the chain at the same step, and no earlier step is
            active.
        prefix: the number of steps before the first active one of the whole batch, if this plan is that of some
            samples of a batch. None means that it is that of a whole batch.
    """

    active: torch.Tensor
    coupling: torch.Tensor
    weight: torch.Tensor
    exit_step: torch.Tensor
    copies: int = 0
    prefix: int | None = None

    @classmethod
    def exact(cls, active: torch.Tensor, **changes) -> "GradientPlan":
        """Plain back-propagation through the active calls: γ = w = 1 and no early exit. `changes` replaces fields."""
        ones, end = torch.ones(active.shape), torch.full(active.shape[1:], len(active))
        return cls(**{"active": active, "coupling": ones, "weight": ones, "exit_step": end} | changes)

    def select(self, samples) -> "GradientPlan":
        """The plan of some samples, given by their columns in this plan, int [b] or a slice."""
        columns = (t[:, samples] for t in (self.active, self.coupling, self.weight))
        return GradientPlan(*columns, self.exit_step[samples], self.copies, self.steps_before_gradient)

    def with_copies(self) -> "GradientPlan":
        """The plan in which each copy is a sample itself, in a column next to the sample that it is made from."""
        return replace(self.select(self.repeated), copies=0)

    def repeat(self, rows: list) -> list:
        """Returns each of B rows 1 + copies times, equal rows next to each other: B·(1 + copies) rows."""
        return [rows[sample] for sample in self.repeated]

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` [B·(1 + copies), ...] over each sample and its copies, [B, ...]."""
        return values.unflatten(0, (-1, 1 + self.copies)).mean(dim=1)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` [B·(1 + copies), ...] over each sample and its copies, [B, ...]."""
        return values.unflatten(0, (-1, 1 + self.copies)).sum(dim=1)

    @property
    def repeated(self) -> torch.Tensor:
        """For each sample and each copy, the column of the sample that it is made from; int [B·(1 + copies)]."""
        return torch.arange(len(self.exit_step)).repeat_interleave(1 + self.copies)

    @classmethod
    def short(cls, num_steps: int, num_samples: int, copies: int = 0) -> "GradientPlan":
        """A plan for a chain of a few steps, in which all steps are active.

        With copies, only the last step is active, and all samples leave the chain there, as copies require.
        """
        active = torch.ones(num_steps, num_samples, dtype=torch.bool)
        if not copies:
            return cls.exact(active)
        active[:-1] = False
        return cls.exact(active, exit_step=torch.full((num_samples,), num_steps - 1), copies=copies)

    @property
    def steps_before_gradient(self) -> int:
        """The number of steps before the first one that is active for any sample of the whole batch; N without one."""
        steps = self.active.any(dim=1).nonzero().flatten().tolist()
        return self.prefix if self.prefix is not None else (steps or [len(self.active)])[0]

    @property
    def early_exits(self) -> torch.Tensor | None:
        """`exit_step` if any sample leaves the chain early, else None."""
        return self.exit_step if self.leaves_early else None

    @property
    def leaves_early(self) -> bool:
        """Whether any sample leaves the chain early, so that the reward sees x̂0 of a step."""
        return bool((self.exit_step < len(self.active)).any())


def stratified_uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draws n numbers from U[0, 1), one in each of n equal strata, in random order; float64 [n].

    Each single draw is uniform, and together the draws cover the range evenly. So an update averages over many
    truncation lengths instead of a few random ones.
    """
    return (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)) / n


def stratified_integers(low: int, high, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    """Draws an integer of low … high-1 for each sample, uniform and stratified over the samples; int64 [B].

    `high` is one number or, if it differs between samples, int [B].
    """
    return low + (stratified_uniform(num_samples, generator) * (torch.as_tensor(high) - low)).long()


def stratified_pairs(num_steps: int, num_samples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws steps k < j for each sample, uniform over the pairs and stratified over the samples; int64 [B] each.

    `num_steps` must be at least 2.
    """
    first, second = torch.triu_indices(num_steps, num_steps, offset=1)
    pair = stratified_integers(0, len(first), num_samples, generator)
    return first[pair], second[pair]


def late_biased(low, high, count, num_steps: int, bias: float, generator: torch.Generator) -> torch.Tensor:
    """Draws `count` distinct steps of low … high-1 for each sample, or all of them if there are fewer; bool [N, B].

    The steps are drawn one after the other, step i with a probability proportional to (i - low + 1)^bias, which prefers
    late steps (FlowBP, arXiv 2606.11075). The code adds Gumbel noise to the logarithms and takes the largest, which is
    the same draw (Kool et al. 2019, arXiv 1903.06059).

    Args:
        low: the lowest step of each sample, int [B].
        high: the step after the highest one of each sample, int [B].
        count: the number of steps of each sample, int [B].
        num_steps: N.
        bias: the exponent; 0 is the uniform draw.
        generator: the source of the random numbers.
    """
    place = torch.arange(num_steps)[:, None] - low + 1
    inside = (place >= 1) & (torch.arange(num_steps)[:, None] < high)
    uniform = torch.rand(inside.shape, generator=generator, dtype=torch.float64)
    score = bias * place.clamp(min=1).double().log() - (-uniform.log()).log()
    rank = score.masked_fill(~inside, -torch.inf).argsort(dim=0, descending=True).argsort(dim=0)
    return inside & (rank < count)
