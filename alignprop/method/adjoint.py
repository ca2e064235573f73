"""The norm of λ on its way down the chain: measuring it, and limiting it."""

import torch

from alignprop.method.chain import per_sample


class AdjointNorms:
    """Sums for the mean of ‖λ‖ at each of x[0] … x[N], over the samples that still need λ there for their gradient.

    A sample that leaves the chain at step i has its final latents, x̂0[i], at the place of x[i+1], and counts only from
    there on. No sample needs λ at x[0].
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.sums, self.counts = None, torch.zeros(num_steps + 1)

    def add(self, i: int, adjoint: torch.Tensor, samples: torch.Tensor) -> None:
        """Adds ‖λ‖ at x[i] of the samples that the bool [B] `samples` picks.

        The sum stays on the device of `adjoint`, so that the host does not wait for it.
        """
        if self.sums is None:
            self.sums = torch.zeros(self.num_steps + 1, device=adjoint.device)
        self.sums[i] += torch.where(samples.to(adjoint.device), norms(adjoint), 0).sum()
        self.counts[i] += samples.sum()

    def take(self) -> torch.Tensor:
        """Returns the sums and counts since the last call, float64 [2, N+1], and sets them to zero."""
        sums = torch.zeros_like(self.counts) if self.sums is None else self.sums.cpu()
        totals = torch.stack([sums, self.counts]).double()
        self.sums, self.counts = None, torch.zeros_like(self.counts)
        return totals


def norms(adjoint: torch.Tensor) -> torch.Tensor:
    """Returns ‖λ‖ of each sample, float32 [B]."""
    return adjoint.flatten(1).float().norm(dim=1)


def limit_norms(adjoint: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Returns λ, scaled down to the limit for each sample with a norm above it; `limit` is [B]."""
    scale = (limit / norms(adjoint).clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
    return adjoint * per_sample(scale.to(adjoint), adjoint)
