"""The rollout and the sweep against closed forms, on denoisers that are linear."""

import pytest
import torch

from alignprop.engine.seeding import generator, generators
from alignprop.method import estimators
from alignprop.method.chain import Sampler
from alignprop.method.plans import GradientPlan
from alignprop.method.rollout import Rollout
from alignprop.settings.memory_policies import MemoryPolicy


def nothing_active(sampler, num_samples) -> GradientPlan:
    return GradientPlan.exact(torch.zeros(sampler.num_steps, num_samples, dtype=torch.bool))


class LinearModel:
    """f(x, t, c) = θ·x: the chain is a product, its derivative has a closed form."""

    def __init__(self, theta):
        self.denoiser = torch.nn.Module()
        self.denoiser.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def init_latents(self, gens):
        return torch.stack([torch.randn(2, generator=g, dtype=torch.float64) for g in gens])

    def mixing_scale(self, guidance_scale):
        return guidance_scale

    def branches(self, cond, guidance_scale):
        return [cond]

    def predict(self, x, t, branch):
        return self.denoiser.theta * x


def test_closed_form_on_a_linear_denoiser():
    """x[N] = x[0] ∏(a + bθ); with the steps of a set S active, ∂x[N]/∂θ = x[0] Σ_S b[i] ∏ over other active
    (a + bθ) and, where later steps are inactive, the detached f leaves the factor a alone."""
    a, b = torch.tensor([0.9, 0.8, 1.1, 0.7]).double(), torch.tensor([0.5, -0.3, 0.2, 0.4]).double()
    theta, s = 0.6, torch.zeros(4)
    active = torch.tensor([[False, True], [True, True], [False, True], [True, True]])
    model = LinearModel(theta)
    rollout = Rollout(model, Sampler(torch.arange(4), a, b, s), guidance_scale=1.0)
    latents = rollout(generators(range(2), "x"), {}, GradientPlan.exact(active))
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    (gradient,) = torch.autograd.grad((weights * latents).sum(), [model.denoiser.theta])

    x = [model.init_latents(generators(range(2), "x"))]
    for i in range(4):
        x.append((a[i] + b[i] * theta) * x[-1])
    expected = 0.0
    for sample in range(2):
        for i in range(4):
            if active[i, sample]:
                later = [a[j] + b[j] * theta * active[j, sample] for j in range(i + 1, 4)]
                slope = b[i] * torch.stack([torch.ones(()).double(), *later]).prod()
                expected += (weights[sample] * slope * x[i][sample]).sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)


class ShiftedModel(LinearModel):
    """f(x, t, c) = θ·x + 3·c."""

    def predict(self, x, t, branch):
        return super().predict(x, t, branch) + 3 * branch["c"]


def conditional_gradient(plan, sampler, weights, theta=0.6, **options):
    """∂(sum of weights · final latents)/∂c of two samples."""
    c = torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    other = torch.zeros(2, 2, dtype=torch.float64)
    rollout = Rollout(ShiftedModel(theta), sampler, guidance_scale=1.0, **options)
    latents = rollout(generators(range(2), "x"), {"c": c, "other": other}, plan)
    (weights * latents).sum().backward()
    assert other.grad is None
    return c.grad


@pytest.mark.parametrize("memory", [MemoryPolicy(), MemoryPolicy(keep_steps=9), MemoryPolicy(sweep_chunk=1)])
def test_the_gradient_of_the_conditioning_in_closed_form(memory):
    """3·Σ over a sample's active steps of w[i]·b[i]·∏ over later ones of what becomes of λ there."""
    a, b, theta = torch.tensor([0.9, 0.8, 1.1, 0.7]).double(), torch.tensor([0.5, -0.3, 0.2, 0.4]).double(), 0.6
    active = torch.tensor([[False, True], [True, True], [False, True], [True, False]])
    coupling, weight = (torch.rand(4, 2, generator=generator(n), dtype=torch.float64) + 0.5 for n in ("γ", "w"))
    plan = GradientPlan.exact(active, coupling=coupling, weight=weight)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    found = conditional_gradient(plan, Sampler(torch.arange(4), a, b, torch.zeros(4)), weights, theta, memory=memory)
    expected = torch.zeros(2, 2).double()
    for sample in range(2):
        carried = 1.0
        for i in reversed(range(4)):
            if active[i, sample]:
                expected[sample] += 3 * weight[i, sample] * b[i] * carried * weights[sample]
            carried *= a[i] + b[i] * theta * coupling[i, sample] * active[i, sample]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_copies_of_a_sample_share_its_conditioning():
    """Of the last step alone: 3·q for each, and λ goes no further."""
    zeros, half = torch.zeros(3).double(), torch.full((3,), 0.5).double()
    level = torch.full((4,), 0.5).double()
    sampler = Sampler(torch.arange(3), half, half, zeros, p=half, q=0.7 + zeros, alpha=level, sigma=level)
    weights = torch.arange(12).double().view(6, 2)
    found = conditional_gradient(estimators.draft_lv(sampler, 2, copies=2), sampler, weights)
    torch.testing.assert_close(found, 3 * 0.7 * weights.view(2, 3, 2).sum(dim=1), rtol=1e-13, atol=0)


def test_without_an_active_step_the_conditioning_gets_exactly_nothing():
    sampler = Sampler(torch.arange(4), torch.ones(4), torch.ones(4), torch.zeros(4))
    assert not conditional_gradient(nothing_active(sampler, 2), sampler, torch.ones(2, 2)).any()


def test_adjoint_clip_bounds_growth_and_is_off_by_default():
    a, b = torch.full((5,), 2.0), torch.zeros(5)

    def norms(**options):
        model = LinearModel(0.1)
        rollout = Rollout(model, Sampler(torch.arange(5), a, b, torch.zeros(5)), 1.0, **options)
        rollout(generators(range(2), "x"), {}, estimators.full(rollout.sampler, 2)).sum().backward()
        sums, counts = rollout.adjoint_norms.take()
        return sums / counts

    start = 2**0.5
    torch.testing.assert_close(norms()[1:], start * torch.tensor([16.0, 8, 4, 2, 1]).double())
    torch.testing.assert_close(norms(adjoint_clip=3.0)[1:], start * torch.tensor([3.0, 3, 3, 2, 1]).double())


def test_adjoint_norms_leave_out_steps_and_samples_below_their_truncation():
    rollout = Rollout(
        LinearModel(0.0), Sampler(torch.arange(3), torch.ones(3), torch.ones(3), torch.zeros(3)), guidance_scale=1.0
    )
    active = torch.tensor([[False, False], [False, True], [True, True]])
    latents = rollout(generators(range(2), "x"), {}, GradientPlan.exact(active))
    (latents * torch.tensor([[1.0], [5.0]])).sum().backward()
    sums, counts = rollout.adjoint_norms.take()
    assert counts.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(sums[2:], torch.tensor([5.0, 6.0]).double() * 2**0.5)
    assert not rollout.adjoint_norms.take().any()


@pytest.mark.parametrize("chunk", [0, 1])
def test_adjoint_norms_leave_out_what_comes_after_an_early_exit(chunk):
    """Whatever samples share a chunk: the first one ends with x̂0 of step 0, and the reward sees nothing later."""
    ones, level = torch.ones(3), torch.full((4,), 0.5).double()
    sampler = Sampler(torch.arange(3), ones, ones, torch.zeros(3), p=ones, q=ones, alpha=level, sigma=level)
    rollout = Rollout(LinearModel(0.0), sampler, 1.0, memory=MemoryPolicy(sweep_chunk=chunk))
    active = torch.tensor([[True, True], [False, False], [False, False]])
    latents = rollout(generators(range(2), "x"), {}, GradientPlan.exact(active, exit_step=torch.tensor([0, 2])))
    (latents * torch.tensor([[1.0], [5.0]])).sum().backward()
    sums, counts = rollout.adjoint_norms.take()
    assert counts.tolist() == [0, 2, 1, 1]
    torch.testing.assert_close(sums[1:], torch.tensor([6.0, 5.0, 5.0]).double() * 2**0.5)
