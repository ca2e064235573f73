"""The estimators: each published way of back-propagating a reward, as a plan of which network calls carry gradient.

An estimator is a function `(sampler, num_samples, generator) -> GradientPlan`. It draws the plan for the whole global
batch before the rollout starts, so a plan can be printed and tested. Every process takes the columns of its samples
from this plan. So neither the number of processes nor the micro-batch size changes the plan.

In the equations, f[i] is the network's output at the stored x[i], and sg(·) stops the gradient. f[i] contributes
c[i]·f[i] to x[j], with c[i] = b[i,i]·a[i+1]·…·a[j-1] in a one-step method (quadrature.py). For Euler's method and flow
matching, c[i] is σ[i+1] - σ[i].
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch

from alignprop.method.chain import Sampler
from alignprop.method.plans import GradientPlan, late_biased, stratified_integers, stratified_pairs
from alignprop.method.quadrature import contributions, direct_steps, interpolation_weights, leap_steps, supports
from alignprop.settings.errors import ConfigError, one_of

Estimator = Callable[[Sampler, int, torch.Generator], GradientPlan]


def full(sampler, num_samples, generator=None) -> GradientPlan:
    """Back-propagation through every step (DRaFT, arXiv 2309.17400, sec. 3.1)."""
    return GradientPlan.exact(torch.ones(sampler.num_steps, num_samples, dtype=torch.bool))


def truncated(sampler, num_samples, generator=None, *, first: int | None = None) -> GradientPlan:
    """Back-propagation through the last K = N - first steps, from sampler step `first` on.

    This is DRaFT-K (Clark et al. 2023, arXiv 2309.17400, sec. 3.2), and for K = 1 AlignProp's truncation to one step
    (arXiv 2310.03739, sec. 4).
    """
    active = _steps(sampler) >= (sampler.num_steps - 1 if first is None else first)
    return GradientPlan.exact(active.expand(sampler.num_steps, num_samples))


def randomized(sampler, num_samples, generator, *, minmax: tuple[int, int] | None = None) -> GradientPlan:
    """AlignProp's randomized truncation: each trajectory draws ONE first step, uniform over minmax[0] … minmax[1]-1.

    (0, N) draws K = 1 … N, so that at least the last step of every trajectory is active (arXiv 2310.03739, sec. 4,
    eq. 4).
    """
    low, high = minmax or (0, sampler.num_steps)
    first = stratified_integers(low, high, num_samples, generator)
    return GradientPlan.exact(_steps(sampler) >= first)


def per_step(sampler, num_samples, generator, *, minmax: tuple[int, int] | None = None) -> GradientPlan:
    """A new truncation step at EVERY sampler step: step i is active if its draw from minmax[0] … minmax[1] is <= i.

    AlignProp's released code and TRL's trainer do this instead of the paper's one draw per trajectory. With (0, 50),
    step i keeps its gradient with probability (i + 1) / 51, independently of the other steps. The estimator is here to
    reproduce their results. Both ends of the range are included, as in their code. In their code the samples of a
    micro-batch share the draws. Here each sample draws separately, which gives the same expectation with less variance.
    """
    low, high = minmax or (0, sampler.num_steps)
    draws = torch.randint(low, high + 1, (sampler.num_steps, num_samples), generator=generator)
    return GradientPlan.exact(draws <= _steps(sampler))


def draft_lv(sampler, num_samples, generator=None, *, copies: int = 2) -> GradientPlan:
    """DRaFT-LV: the last step's gradient, averaged over n more noises (Clark et al. 2023, arXiv 2309.17400, sec. 3.3).

        x⁽ʲ⁾ = α·sg(x̂0) + σ·z⁽ʲ⁾,   gradient of (R(x̂0(x[N-1])) + Σ_j R(x̂0(x⁽ʲ⁾))) / (1 + n)

    α and σ are the noise level of the last step, and `copies` is n. This costs n further calls of network, decoder and
    reward, but no further rollout.
    """
    last = sampler.num_steps - 1
    exits = torch.full((num_samples,), last)
    return GradientPlan.exact(truncated(sampler, num_samples, first=last).active, exit_step=exits, copies=copies)


def refl(sampler, num_samples, generator, *, exit_window: float = 0.25) -> GradientPlan:
    """ReFL: the reward sees x̂0 of one late step τ, the only active one (Xu et al. 2023, arXiv 2304.05977, alg. 1).

        gradient of R(p[τ]·sg(x[τ]) + q[τ]·f[τ])

    τ is uniform over the last part of the chain, of length `exit_window`: by default a quarter, which in the paper is
    10 of 40 steps.
    """
    exits = _exits(sampler, num_samples, generator, exit_window)
    return GradientPlan.exact(_steps(sampler) == exits, exit_step=exits)


def drtune(sampler, num_samples, generator, *, num_active: int = 3, exit_window: float = 0.4) -> GradientPlan:
    """DRTune: K equally spaced steps, inputs detached, early exit (Wu et al. 2024, arXiv 2405.00760, alg. 1).

        x[i+1] = a[i]·x[i] + b[i]·f(sg(x[i])),   the reward sees x̂0[τ]

    τ is uniform over the last part of the chain, of length `exit_window`, by default 40 %. The K = `num_active` steps
    have the spacing ⌊(τ+1)/K⌋ and a random start, and step τ need not be among them. If τ+1 < K, all steps up to τ are
    active.
    """
    exits = _exits(sampler, num_samples, generator, exit_window)
    count = (exits + 1).clamp(max=num_active)
    stride = (exits + 1) // count
    start = stratified_integers(0, exits + 1 - (count - 1) * stride, num_samples, generator)
    offset = _steps(sampler) - start
    active = (offset >= 0) & (offset % stride == 0) & (offset // stride < count)
    return GradientPlan.exact(active, coupling=torch.zeros(active.shape), exit_step=exits)


def sparse(sampler, num_samples, generator, *, num_active=4, late_bias=1.0, rescale=0.5) -> GradientPlan:
    """FlowBP-Sparse: K steps with a late bias, inputs detached, the reward sees x[N] (arXiv 2606.11075).

        x[N] = A·x[0] + Σ_active c[i]·f(sg(x[i])) + Σ_inactive sg(c[i]·f[i])

    `num_active` is K, and `late_bias` is the exponent of the draw (`plans.late_biased`). Each active step's gradient is
    multiplied by 1 + rescale·(Σ|c| / Σ_active|c| - 1), so with `rescale` = 1 the K steps stand for all N.
    """
    n, everyone = sampler.num_steps, torch.zeros(num_samples, dtype=torch.long)
    active = late_biased(everyone, everyone + n, everyone + num_active, n, late_bias, generator)
    weight = _rescaled(sampler, active, rescale)
    return GradientPlan.exact(active, coupling=torch.zeros(active.shape), weight=weight)


def bridge(sampler, num_samples, generator, *, num_active=5, late_bias=4.0, rescale=0.0, coupling=0.5) -> GradientPlan:
    """FlowBP-Bridge: FlowBP-Sparse on both sides of a step j that passes α·∂f/∂x on (arXiv 2606.11075).

        x[j] = A·x[0] + Σ_{i<j} as in sparse
        x[N] = A·x[j] + c[j]·f(α·x[j] + (1-α)·sg(x[j])) + Σ_{i>j} as in sparse

    j is the later step of a uniform pair of steps, and is always active. The K = `num_active` steps, j among them, are
    divided between the two sides in proportion to their lengths. `coupling` is α. N must be at least 2. With K = 1 only
    j is active.
    """
    n = _at_least_two(sampler, "bridge")
    _, split = stratified_pairs(n, num_samples, generator)
    total = torch.full_like(split, min(num_active, n))
    before = (total * split / n).round().long().clamp(min=1).minimum(split).minimum(total - 1)
    before = before.maximum(total - (n - split))
    after = total - before
    active = late_biased(torch.zeros_like(split), split, before, n, late_bias, generator)
    active |= late_biased(split + 1, torch.full_like(split, n), after - 1, n, late_bias, generator)
    at_split = _steps(sampler) == split
    weight = _rescaled(sampler, active | at_split, rescale)
    return GradientPlan.exact(active | at_split, coupling=coupling * weight * at_split, weight=weight)


def lagrange(
    sampler, num_samples, generator, *, order=3, num_active=2, support_scale=0.25, coupling=0.1
) -> GradientPlan:
    """FlowBP-Lagrange: two leaps k → j → N, by quadrature over a few support steps (arXiv 2606.11075).

        x[j] = A·x[k] + Σ_s W[s]·f[s],   x[N] = A·x[j] + W[j]·f(α·x[j] + (1-α)·sg(x[j])) + Σ_s W[s]·f[s]

    The weights W integrate the polynomial through f at `order` evenly spaced supports of a leap (method/quadrature.py).
    The first `num_active` supports of each leap are active. The gradient of each, except the first, is multiplied by
    `support_scale`. The pair k < j is uniform, and `coupling` is α. N must be at least 2.
    """
    n = _at_least_two(sampler, "lagrange")
    active, weight = torch.zeros(2, n, num_samples, dtype=torch.float64)
    steps = leap_steps(sampler, order)
    starts, splits = (steps[drawn] for drawn in stratified_pairs(len(steps), num_samples, generator))
    for sample, (start, split) in enumerate(zip(starts.tolist(), splits.tolist(), strict=True)):
        for first, end in ((start, split), (split, n)):
            points = supports(first, end, order)
            direct = contributions(sampler, first, end)
            shares = interpolation_weights(sampler, first, end, points) / direct[[i - first for i in points]]
            for i, share in list(zip(points, shares, strict=True))[:num_active]:
                active[i, sample] = 1
                weight[i, sample] = share * (1 if i == first else support_scale)
    active = active.bool() & (weight != 0)  # the weight of a support can happen to be 0
    at_split = _steps(sampler) == splits
    weight = torch.where(active, weight, 1)
    return GradientPlan.exact(active, coupling=coupling * weight * at_split, weight=weight)


def leapalign(sampler, num_samples, generator, *, coupling=0.3) -> GradientPlan:
    """LeapAlign: two leaps k → j → N that hold f constant (Liang et al. 2026, arXiv 2604.15311).

        x[j] = A·x[k] + (Σ_{k≤i<j} c[i])·f[k],   x[N] = A·x[j] + (Σ_{i≥j} c[i])·f(α·x[j] + (1-α)·sg(x[j]))

    These equations define the gradient only; the values of x are the rollout's. The pair k < j is uniform over the
    steps with a direct contribution to x[N] (quadrature.py), and `coupling` is the discount α. For flow
    matching the sums are σ[j] - σ[k] and σ[N] - σ[j]. The paper also weights samples by the similarity of leap and
    rollout, which is left out here. There must be at least 2 such steps.
    """
    _at_least_two(sampler, "leapalign")
    return lagrange(sampler, num_samples, generator, order=1, num_active=1, coupling=coupling)


ESTIMATORS = {
    function.__name__: function
    for function in (
        full,
        truncated,
        randomized,
        per_step,
        draft_lv,
        refl,
        drtune,
        sparse,
        bridge,
        lagrange,
        leapalign,
    )
}


def build_estimator(name: str, **options) -> Estimator:
    """Returns the estimator called `name`, with its options set.

    Args:
        name: a key of ESTIMATORS.
        options: `first` is the field `trunc_backprop_timestep`, 0 … N-1. `minmax` is the field
            `truncated_backprop_minmax`, 0 <= minmax[0] < minmax[1] <= N. The other options are the fields of `plan`.
            An option that is None gets the estimator's default. Options that the estimator does not take are ignored.

    Raises:
        ConfigError: there is no such estimator.
    """
    one_of("estimator", name, ESTIMATORS)
    taken = inspect.signature(ESTIMATORS[name]).parameters
    return partial(ESTIMATORS[name], **{k: v for k, v in options.items() if k in taken and v is not None})


def _steps(sampler: Sampler) -> torch.Tensor:
    return torch.arange(sampler.num_steps)[:, None]


def _exits(sampler: Sampler, num_samples: int, generator, window: float) -> torch.Tensor:
    """Draws τ for each sample, uniform over the last ⌈window·N⌉ steps; int64 [B]."""
    late = math.ceil(window * sampler.num_steps)
    return stratified_integers(sampler.num_steps - late, sampler.num_steps, num_samples, generator)


def _at_least_two(sampler: Sampler, name: str) -> int:
    if sampler.num_steps < 2:
        raise ConfigError(f"estimator = {name!r} needs train.num_inference_steps of at least 2")
    return sampler.num_steps


def _rescaled(sampler: Sampler, active: torch.Tensor, rescale: float) -> torch.Tensor:
    """The weight 1 + rescale·(Σ|c| / Σ_active|c| - 1), the same at all steps of a sample; float64 [N, B]."""
    direct_steps(sampler)  # an error if some steps contribute nothing, because these could be the only active ones
    size = contributions(sampler, 0, sampler.num_steps).abs()[:, None]
    factor = 1 + rescale * (size.sum() / (size * active).sum(dim=0) - 1)
    return factor.expand(active.shape)
