"""Leaps over several steps of a sampling chain, and the weights of the network's outputs in them.

    x[j] = A·x[k] + Σ_{k≤i<j} c[i]·f[i],     c[i] = Σ_{i≤n<j} b[n,i]·a[n+1]·…·a[j-1]

This equation is the chain itself. A multistep method adds outputs before f[k], which count as constants here. A leap
uses f at a few steps only, the supports. At the other steps it replaces f by the polynomial in σ through the supports.
"""

import numpy as np
import torch

from alignprop.method.chain import Sampler
from alignprop.settings.errors import ConfigError


def contributions(sampler: Sampler, start: int, end: int) -> torch.Tensor:
    """Returns c[start] … c[end-1], the weights of f[i] in x[end]; float64 [end - start]."""
    a, b = sampler.a[start:end].double(), sampler.b[start:end, start:end].double()
    later = torch.cat([a[1:].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    return later @ b


def direct_steps(sampler: Sampler, at_least: int | None = None) -> torch.Tensor:
    """Returns the steps with a contribution to the end of the chain that is not zero, in order; int64.

    A contribution is zero if a later step keeps nothing of its latents, or if f[i] serves an intermediate point only.

    Args:
        sampler: the chain.
        at_least: the number of such steps that are needed; None means all.

    Raises:
        ConfigError: there are fewer.
    """
    steps = contributions(sampler, 0, sampler.num_steps).nonzero().flatten()
    if len(steps) < (sampler.num_steps if at_least is None else at_least):
        raise _no_contribution()
    return steps


def leap_steps(sampler: Sampler, order: int) -> torch.Tensor:
    """Returns the steps at which a leap can begin or end, in order; int64.

    They contribute to the end of the chain and to each other. A leap with several supports needs all steps, and each of
    them must have its own noise level, because the supports are the nodes of a polynomial in σ.

    Args:
        sampler: the chain.
        order: the number of supports in a leap.

    Raises:
        ConfigError: there are fewer than two such steps, or one of them does not contribute to a later one; or two
            steps have the same noise level, as in methods of second order.
    """
    steps = direct_steps(sampler, at_least=2 if order == 1 else None)
    if not all(contributions(sampler, 0, end)[steps[steps < end]].all() for end in steps[1:].tolist()):
        raise _no_contribution()
    levels = (sampler.alpha / sampler.sigma)[:-1].double().sort().values
    if order > 1 and (levels.diff() <= 1e-6 * levels[1:]).any():  # equal but for rounding
        raise ConfigError("estimator: 'lagrange' needs another noise level at each step, which this sampler lacks")
    return steps


def _no_contribution() -> ConfigError:
    return ConfigError(
        "estimator: this estimator weights each step by its direct contribution to the end of the chain or of a leap, "
        "which is zero for some steps of this model's sampler; 'randomized' and 'truncated' work with every sampler"
    )


def supports(start: int, end: int, order: int) -> list[int]:
    """Returns at most `order` steps, about evenly spaced over start … end-1. The first one is `start`."""
    return torch.linspace(start, end - 1, min(order, end - start)).round().long().unique().tolist()


def interpolation_weights(sampler: Sampler, start: int, end: int, points: list[int]) -> torch.Tensor:
    """Returns W[s] with x[end] ≈ A·x[start] + Σ_s W[s]·f[s], for each s of `points`; float64 [len(points)].

        W[s] = Σ_i c[i] · mean of ℓ_s over [σ[i+1], σ[i]],     ℓ_s(σ) = Π_{r≠s} (σ - σ_r) / (σ_s - σ_r)

    For flow matching, c[i] = σ[i+1] - σ[i], so W[s] is the integral ∫ ℓ_s dσ over the leap, which is FlowBP-Lagrange's
    weight (arXiv 2606.11075). The sum of W over the supports is the sum of c over the steps of the leap.
    """
    c, levels = contributions(sampler, start, end), sampler.sigma.double()
    nodes, weights = levels[points], []
    # Gauss-Legendre quadrature with len(points) nodes integrates the polynomial exactly.
    places, masses = _gauss_legendre(len(points))
    level = (levels[start:end, None] * (1 + places) + levels[start + 1 : end + 1, None] * (1 - places)) / 2
    for s in range(len(points)):
        others = torch.cat([nodes[:s], nodes[s + 1 :]])
        basis = ((level[..., None] - others) / (nodes[s] - others)).prod(dim=-1)
        weights.append((c * (basis * masses).sum(dim=1) / 2).sum())
    return torch.stack(weights)


def _gauss_legendre(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the nodes in [-1, 1] and the weights, which sum to 2; float64 [count] each."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
