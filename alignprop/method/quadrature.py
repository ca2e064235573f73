"""Leaps over several steps of a sampling chain: what the network's outputs on the way contribute to their end.

    x[j] = A·x[k] + Σ_{k≤i<j} c[i]·f[i],     c[i] = b[i]·a[i+1]·…·a[j-1]

is the chain itself. A leap knows f at a few supports only and takes for the others the polynomial through these.
"""

import torch

from alignprop.method.samplers import Sampler
from alignprop.settings.errors import ConfigError


def contributions(sampler: Sampler, start: int, end: int) -> torch.Tensor:
    """c[start] … c[end-1], with which f reaches x[end]; float64 [end - start].

    Raises:
        ConfigError: some step has no direct way there, because a later one keeps nothing of its latents.
    """
    a, b = sampler.a[start:end].double(), sampler.b[start:end].double()
    later = torch.cat([a[1:].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    if not (b * later).all():
        raise ConfigError(
            "estimator: this one weighs steps by their direct way to the end of the chain, and the sampler of "
            "pretrained.model has steps without any; 'randomized' and 'truncated' work with every sampler"
        )
    return b * later


def supports(start: int, end: int, order: int) -> list[int]:
    """At most `order` steps, about evenly spaced over start … end-1, the first of which is `start`."""
    return torch.linspace(start, end - 1, min(order, end - start)).round().long().unique().tolist()


def interpolation_weights(sampler: Sampler, start: int, end: int, points: list[int]) -> torch.Tensor:
    """W[s] with x[end] ≈ A·x[start] + Σ_s W[s]·f[s]; float64, one for each of `points`.

        W[s] = Σ_i c[i] · mean of ℓ_s over [σ[i+1], σ[i]],     ℓ_s(σ) = Π_{r≠s} (σ - σ_r) / (σ_s - σ_r)

    For flow matching, where c[i] = σ[i+1] - σ[i], that is ∫ ℓ_s dσ over the leap, FlowBP-Lagrange's weight (arXiv
    2606.11075). The weights of all supports add up to those of all steps, and a single support has them all.
    """
    c, levels = contributions(sampler, start, end), sampler.sigma.double()
    nodes = levels[points]
    weights = []
    for s in range(len(points)):
        others = torch.cat([nodes[:s], nodes[s + 1 :]])
        # Gauss-Legendre with that many points integrates the polynomial exactly.
        places, masses = _gauss_legendre(len(points))
        level = (levels[start:end, None] * (1 + places) + levels[start + 1 : end + 1, None] * (1 - places)) / 2
        basis = ((level[..., None] - others) / (nodes[s] - others)).prod(dim=-1)
        weights.append((c * (basis * masses).sum(dim=1) / 2).sum())
    return torch.stack(weights)


def _gauss_legendre(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes in [-1, 1] and weights that sum to 2."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
