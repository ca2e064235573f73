"""Every estimator once more, as its paper defines it: one sample, a plain loop, one autograd graph.

What training does in another way (alignprop/method/rollout.py) is held against these by
tests/runs/test_definitions.py and scripts/gradient_table.py. The random choices are read off a
plan; what they mean is written here anew.
"""

from functools import cached_property

import numpy as np
import torch

from alignprop.method.chain import Sampler
from alignprop.method.plans import GradientPlan


class Chain:
    """A sampling chain of one sample.

    Args:
        f: (latents [1, ...], step) -> the network's output, differentiable.
        sampler: deterministic.
        start: x[0], [1, ...].
        plan: of one sample.
        noises: of its copies, [copies, ...].
        options: of the estimator.
    """

    def __init__(self, f, sampler: Sampler, start, plan: GradientPlan, noises=None, **options):
        self.f, self.sampler, self.plan, self.noises, self.options = f, sampler, plan, noises, options
        self.active = plan.active[:, 0].nonzero().squeeze(1).tolist()
        self.end = sampler.num_steps
        self.a, self.b, self.p, self.q = (c.tolist() for c in (sampler.a, sampler.b.diagonal(), sampler.p, sampler.q))
        self.start = start

    @cached_property
    def _without_gradient(self) -> tuple[list, list]:
        x, f_values = [self.start], []
        with torch.no_grad():
            for i in range(self.end):
                f_values.append(self.f(x[i], i))
                x.append(self.a[i] * x[i] + self.b[i] * f_values[i])
        return x, f_values

    @property
    def x(self) -> list:
        """The latents x[0] … x[N], without a graph."""
        return self._without_gradient[0]

    @property
    def f_values(self) -> list:
        """The network's outputs in all steps, without a graph."""
        return self._without_gradient[1]

    def reach(self, start: int, end: int) -> tuple[float, list[float]]:
        """A and c with x[end] = A·x[start] + Σ c[i]·f[i]."""
        whole = float(np.prod(self.a[start:end]))
        return whole, [self.b[i] * float(np.prod(self.a[i + 1 : end])) for i in range(start, end)]

    def split(self) -> int:
        """The step that passes some of its input's gradient on."""
        return int((self.plan.coupling[:, 0] * self.plan.active[:, 0]).nonzero()[0])

    def discounted(self, latents):
        """α·x + (1-α)·sg(x)"""
        alpha = self.options["coupling"]
        return alpha * latents + (1 - alpha) * latents.detach()


def as_is(value, like):
    """The gradient of `value` at the value of `like`: a straight-through connector."""
    return value + (like - value).detach()


def scaled(value, factor):
    """The value of `value` and `factor` times its gradient."""
    return value.detach() + factor * (value - value.detach())


def detached_outputs(chain: Chain):
    """full, truncated, randomized, per_step: the chain itself, with the outputs of other steps detached."""
    x = chain.start
    for i in range(chain.end):
        output = chain.f(x, i)
        x = chain.a[i] * x + chain.b[i] * (output if i in chain.active else output.detach())
    return [x]


def draft_lv(chain: Chain):
    last, sampler = chain.end - 1, chain.sampler
    found = [chain.p[last] * chain.x[last] + chain.q[last] * chain.f(chain.x[last], last)]
    for noise in chain.noises:
        x = float(sampler.alpha[last]) * found[0].detach() + float(sampler.sigma[last]) * noise[None]
        found.append(chain.p[last] * x + chain.q[last] * chain.f(x, last))
    return found


def refl(chain: Chain):
    tau = int(chain.plan.exit_step)
    return [chain.p[tau] * chain.x[tau] + chain.q[tau] * chain.f(chain.x[tau], tau)]


def drtune(chain: Chain):
    x, tau = chain.start, int(chain.plan.exit_step)
    for i in range(tau + 1):
        output = chain.f(x.detach(), i)
        output = output if i in chain.active else output.detach()
        clean, x = chain.p[i] * x + chain.q[i] * output, chain.a[i] * x + chain.b[i] * output
    return [clean]


def compose(chain: Chain, x, start: int, end: int, factor: float, first=None):
    """x[end] from x[start], with the outputs of active steps at stored latents; `first` is the first one's input."""
    whole, c = chain.reach(start, end)
    x = whole * x
    for i in range(start, end):
        at = first if first is not None and i == start else chain.x[i]
        x = x + c[i - start] * (scaled(chain.f(at, i), factor) if i in chain.active else chain.f_values[i])
    return x


def rescale(chain: Chain) -> float:
    _, c = chain.reach(0, chain.end)
    return 1 + chain.options["rescale"] * (sum(map(abs, c)) / sum(abs(c[i]) for i in chain.active) - 1)


def sparse(chain: Chain):
    return [as_is(compose(chain, chain.x[0], 0, chain.end, rescale(chain)), chain.x[-1])]


def bridge(chain: Chain):
    j, factor = chain.split(), rescale(chain)
    middle = as_is(compose(chain, chain.x[0], 0, j, factor), chain.x[j])
    return [as_is(compose(chain, middle, j, chain.end, factor, chain.discounted(middle)), chain.x[-1])]


def leap(chain: Chain, x, start: int, end: int, order: int, num_active: int, scale: float, first):
    """x[end] from x[start] by quadrature over the supports, which are evenly spaced."""
    whole, c = chain.reach(start, end)
    points = sorted({int(np.rint(v)) for v in np.linspace(start, end - 1, min(order, end - start))})
    levels = chain.sampler.sigma.double().numpy()
    x = whole * x
    for rank, s in enumerate(points):
        basis = np.polynomial.Polynomial([1.0])
        for r in points:
            if r != s:
                basis *= np.polynomial.Polynomial([-levels[r], 1.0]) / (levels[s] - levels[r])
        integral = basis.integ()
        means = np.diff(integral(levels[start : end + 1])) / np.diff(levels[start : end + 1])
        weight = float(np.dot(c, means))
        if rank == 0:
            x = x + weight * chain.f(first, s)
        elif rank < num_active:
            x = x + weight * scaled(chain.f(chain.x[s], s), scale)
        else:
            x = x + weight * chain.f_values[s]
    return x


def lagrange(chain: Chain):
    k, j, o = chain.active[0], chain.split(), chain.options
    rest = o["order"], o["num_active"], o["support_scale"]
    middle = as_is(leap(chain, chain.x[k], k, j, *rest, first=chain.x[k]), chain.x[j])
    return [as_is(leap(chain, middle, j, chain.end, *rest, first=chain.discounted(middle)), chain.x[-1])]


def leapalign(chain: Chain):
    k, j = chain.active[0], chain.split()
    _, c = chain.reach(k, j)
    middle = as_is(chain.reach(k, j)[0] * chain.x[k] + sum(c) * chain.f(chain.x[k], k), chain.x[j])
    whole, c = chain.reach(j, chain.end)
    return [as_is(whole * middle + sum(c) * chain.f(chain.discounted(middle), j), chain.x[-1])]


DEFINITIONS = {
    **dict.fromkeys(("full", "truncated", "randomized", "per_step"), detached_outputs),
    **{d.__name__: d for d in (draft_lv, refl, drtune, sparse, bridge, lagrange, leapalign)},
}
