import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from alignprop.method.quadrature import contributions, direct_steps, interpolation_weights, supports
from alignprop.method.samplers import build_sampler
from alignprop.settings.errors import ConfigError

FLOW = build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 12)
DDIM = build_sampler(DDIMScheduler(), 12)


@pytest.mark.parametrize("sampler", [FLOW, DDIM])
def test_contributions_are_what_the_chain_adds_up(sampler):
    start, end = 3, 9
    outputs = torch.randn(12, dtype=torch.float64)
    x = 0.0
    for i in range(start, end):
        x = sampler.a[i] * x + sampler.b[i, i] * outputs[i]
    torch.testing.assert_close((contributions(sampler, start, end) * outputs[start:end]).sum(), x)


def test_a_step_that_keeps_nothing_leaves_earlier_ones_without_a_way():
    sampler = build_sampler(DDIMScheduler(prediction_type="sample", set_alpha_to_one=True), 4)
    with pytest.raises(ConfigError, match="zero for some steps"):
        direct_steps(sampler)


@pytest.mark.parametrize(("start", "end", "order", "expected"), [
    (0, 12, 1, [0]), (0, 12, 3, [0, 6, 11]), (4, 6, 3, [4, 5]), (7, 8, 5, [7]), (2, 7, 5, [2, 3, 4, 5, 6]),
])  # fmt: skip
def test_supports_begin_at_the_start_and_are_spread_evenly(start, end, order, expected):
    assert supports(start, end, order) == expected


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_flow_weights_integrate_polynomials_of_their_degree(order):
    """∫ σᵈ dσ over the leap, for every degree below the number of supports; not for the next one."""
    start, end = 2, 11
    points = supports(start, end, order)
    weights, levels = interpolation_weights(FLOW, start, end, points), FLOW.sigma
    for degree in range(order + 1):
        found = (weights * levels[points] ** degree).sum()
        exact = (levels[end] ** (degree + 1) - levels[start] ** (degree + 1)) / (degree + 1)
        assert torch.isclose(found, exact, rtol=1e-6) == (degree < order)


@pytest.mark.parametrize("sampler", [FLOW, DDIM])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_share_out_what_all_steps_contribute(sampler, order):
    weights = interpolation_weights(sampler, 1, 10, supports(1, 10, order))
    torch.testing.assert_close(weights.sum(), contributions(sampler, 1, 10).sum())


def test_an_epsilon_leap_is_one_larger_step_of_ddim():
    """Holding ε constant over several steps is DDIM's step between their ends."""
    coarse, fine = (build_sampler(DDIMScheduler(timestep_spacing="trailing"), n) for n in (5, 20))
    assert torch.equal(fine.timesteps[::4], coarse.timesteps)
    (weight,) = interpolation_weights(fine, 4, 8, [4])
    torch.testing.assert_close(weight, coarse.b[1, 1], rtol=1e-5, atol=0)
    torch.testing.assert_close(fine.a[4:8].prod(), coarse.a[1], rtol=1e-5, atol=0)
