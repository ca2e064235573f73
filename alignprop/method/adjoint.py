"""λ on its way down the chain: how large it is, and how large it may become."""

import torch


class AdjointNorms:
    """Running mean of ‖λ‖ at each of x[0] … x[N], over the samples whose gradient still needs it there."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.sums, self.counts = None, torch.zeros(num_steps + 1)

    def add(self, i: int, adjoint: torch.Tensor, samples: torch.Tensor) -> None:
        """‖λ‖ of some of the samples (bool [B]) at x[i]; summed where it is, so that the host need not wait for it."""
        if self.sums is None:
            self.sums = torch.zeros(self.num_steps + 1, device=adjoint.device)
        self.sums[i] += torch.where(samples.to(adjoint.device), norms(adjoint), 0).sum()
        self.counts[i] += samples.sum()

    def take(self) -> torch.Tensor:
        """Sums and counts, float64 [2, N+1], since the last call."""
        sums = torch.zeros_like(self.counts) if self.sums is None else self.sums.cpu()
        totals = torch.stack([sums, self.counts]).double()
        self.sums, self.counts = None, torch.zeros_like(self.counts)
        return totals


def norms(adjoint: torch.Tensor) -> torch.Tensor:
    """‖λ‖ of each sample, float32 [B]."""
    return adjoint.flatten(1).float().norm(dim=1)


def limit_norms(adjoint: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """λ, scaled down where its norm exceeds the sample's limit [B]."""
    scale = (limit / norms(adjoint).clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
    return adjoint * scale.to(adjoint).view(-1, *[1] * (adjoint.dim() - 1))
