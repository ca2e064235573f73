from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from alignprop.method.samplers import add_noise, build_sampler
from alignprop.settings.errors import ConfigError


def scheduler(prediction_type, **options):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type=prediction_type, **options,
    )  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_a_step_from_the_coefficients_is_the_scheduler_step(prediction_type, eta, num_steps):
    ddim = scheduler(prediction_type)
    sampler = build_sampler(ddim, num_steps, eta)
    ddim.set_timesteps(num_steps)
    torch.testing.assert_close(sampler.timesteps, ddim.timesteps)
    for i, t in enumerate(ddim.timesteps):
        x, f, z = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        expected = ddim.step(f, t, x, eta=eta, variance_noise=z).prev_sample
        ours = float(sampler.a[i]) * x + float(sampler.b[i, i]) * f + float(sampler.s[i, i]) * z
        assert (ours - expected).norm() <= 1e-6 * expected.norm(), f"step {i}"


def test_only_a_stochastic_sampler_has_noise():
    assert not build_sampler(scheduler("epsilon"), 10, eta=0.0).is_stochastic
    assert build_sampler(scheduler("epsilon"), 10, eta=1.0).is_stochastic


def test_another_scheduler_of_the_same_model_gives_its_ddim_chain():
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    ours = build_sampler(PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **options), 10)
    expected = build_sampler(scheduler("epsilon"), 10)
    assert torch.equal(ours.timesteps, expected.timesteps)
    torch.testing.assert_close(ours.a, expected.a)


def test_clipping_configured_in_the_scheduler_does_not_bend_the_step():
    clipped = DDIMScheduler.from_config(scheduler("epsilon").config, clip_sample=True)
    torch.testing.assert_close(build_sampler(clipped, 10).b, build_sampler(scheduler("epsilon"), 10).b)


def test_unknown_prediction_type_is_refused_by_name():
    odd = scheduler("epsilon")
    odd.register_to_config(prediction_type="flow")
    with pytest.raises(ConfigError, match="'flow'"):
        build_sampler(odd, 10)


def test_more_steps_than_the_model_was_trained_with():
    with pytest.raises(ConfigError, match="num_inference_steps = 1001 must not exceed the model's 1000"):
        build_sampler(scheduler("epsilon"), 1001)


def test_so_many_steps_that_the_offset_leaves_the_schedule():
    with pytest.raises(ConfigError, match=r"num_inference_steps = 1000 is too many .* steps_offset = 1"):
        build_sampler(scheduler("epsilon"), 1000)


def test_a_field_of_another_name_is_named():
    with pytest.raises(ConfigError, match=r"^train\.num_inference_steps = 1001 must not exceed"):
        build_sampler(scheduler("epsilon"), 1001, field="train.num_inference_steps")
    with pytest.raises(ConfigError, match=r"^train\.num_inference_steps = 1000 is too many"):
        build_sampler(scheduler("epsilon"), 1000, field="train.num_inference_steps")


# ---- flow matching


@pytest.mark.parametrize(("options", "schedule"), [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"use_dynamic_shifting": True}, {"mu": 1.15}),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 0.5}),
], ids=["plain", "shift", "shift by size", "stretched"])  # fmt: skip
@pytest.mark.parametrize("num_steps", [4, 10, 25])
def test_an_euler_step_from_the_coefficients_is_the_scheduler_step(num_steps, options, schedule):
    euler = FlowMatchEulerDiscreteScheduler(**options)
    euler.set_timesteps(7, **schedule)
    before = euler.timesteps
    sampler = build_sampler(euler, num_steps, **schedule)
    assert torch.equal(euler.timesteps, before)  # the model's own is as it was
    euler.set_timesteps(num_steps, **schedule)
    assert torch.equal(sampler.timesteps, euler.timesteps) and sampler.num_steps == num_steps
    assert sampler.timesteps.dtype == torch.float32 and not sampler.is_stochastic
    ours = expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(euler.timesteps):
        velocity = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        expected = euler.step(velocity, t, expected).prev_sample
        ours = float(sampler.a[i]) * ours + float(sampler.b[i, i]) * velocity
        assert (ours - expected).norm() <= 1e-6 * expected.norm(), f"step {i}"


def test_the_euler_coefficients_are_the_differences_of_the_noise_levels():
    sampler = build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    levels = torch.cat([sampler.timesteps.double() / 1000, torch.zeros(1)])
    assert torch.equal(sampler.a, torch.ones(10).double()) and sampler.b.dtype == sampler.s.dtype == torch.float64
    torch.testing.assert_close(sampler.b.diagonal(), levels.diff(), rtol=0, atol=1e-6)
    assert not torch.equal(sampler.timesteps, build_sampler(FlowMatchEulerDiscreteScheduler(), 10).timesteps)


def test_a_pipelines_own_noise_levels():
    levels = [1.0, 0.75, 0.5, 0.25]
    sampler = build_sampler(FlowMatchEulerDiscreteScheduler(), 4, sigmas=levels)
    torch.testing.assert_close(sampler.timesteps, 1000 * torch.tensor(levels))
    torch.testing.assert_close(sampler.b.diagonal(), torch.full((4,), -0.25).double())


def test_a_shift_by_the_size_of_the_picture_needs_to_know_it():
    with pytest.raises(ConfigError, match=r"pretrained\.model.*use_dynamic_shifting"):
        build_sampler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


def test_a_scheduler_that_adds_noise_gives_its_deterministic_chain():
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert torch.equal(build_sampler(noisy, 4).b, build_sampler(FlowMatchEulerDiscreteScheduler(), 4).b)


@pytest.mark.parametrize("kind", [
    FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
])  # fmt: skip
def test_the_schedulers_class_chooses_the_chain(kind):
    flow, expected = kind(shift=3.0), build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    assert torch.equal(build_sampler(flow, 10, 0.0).b, expected.b)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_flow_with_noise_keeps_the_distribution_of_every_noise_level(eta):
    """From α·x0 + σ·e, with the velocity e - x0 known, a step has mean α'·x0 and variance σ'² again."""
    plain = build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    sampler = add_noise(plain, eta)
    alpha, sigma = sampler.alpha, sampler.sigma
    of_x0 = sampler.a * alpha[:-1] - sampler.b.diagonal()
    of_noise = sampler.a * sigma[:-1] + sampler.b.diagonal()
    torch.testing.assert_close(of_x0, alpha[1:])
    torch.testing.assert_close(of_noise**2 + sampler.s.diagonal() ** 2, sigma[1:] ** 2)
    assert (sampler.s.diagonal()[:-1] > 0).all() and sampler.s.diagonal()[-1] == 0 and sampler.is_stochastic
    assert torch.equal(sampler.q, plain.q) and torch.equal(sampler.timesteps, plain.timesteps)
    assert add_noise(plain, 0.0) is plain


def test_the_most_noise_forgets_the_noise_before_as_ancestral_sampling_does():
    """x[i] given x[i+1] and x0 is then the forward process, which adds noise to x[i+1]: cov(x[i], x[i+1]) says so."""
    sampler = add_noise(build_sampler(FlowMatchEulerDiscreteScheduler(), 8), 1.0)
    alpha, sigma = sampler.alpha, sampler.sigma
    covariance = (sampler.a * sigma[:-1] + sampler.b.diagonal()) * sigma[:-1]  # of the noise in x[i] and in x[i+1]
    torch.testing.assert_close(covariance, alpha[:-1] / alpha[1:] * sigma[1:] ** 2)


def test_a_flow_with_noise_is_flow_grpos_equation_in_small_steps():
    """dx = (f + g²/(2t)·(x + (1-t)·f))·dt + g·dw with g = √2·eta·√(t/(1-t)), dt < 0 (Flow-GRPO, eq. 9)."""
    eta, dt, plain = 0.5, torch.tensor(-1e-5), build_sampler(FlowMatchEulerDiscreteScheduler(), 1)
    for t in torch.linspace(0.9, 0.1, 9, dtype=torch.float64):
        levels = torch.stack([t, t + dt])
        sampler = add_noise(replace(plain, alpha=1 - levels, sigma=levels), eta)
        g = 2**0.5 * eta * (t / (1 - t)).sqrt()
        for ours, expected in (
            (sampler.s[0, 0] / (-dt).sqrt(), g),
            ((sampler.a[0] - 1) / dt, g**2 / (2 * t)),
            (sampler.b[0, 0] / dt, 1 + g**2 * (1 - t) / (2 * t)),
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_predicted_clean_latents_are_the_schedulers(prediction_type, eta):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    sampler = build_sampler(scheduler, 7, eta)
    scheduler.set_timesteps(7)
    x, f = torch.randn(2, 2, 3, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(f, t, x, eta=eta).pred_original_sample
        ours = float(sampler.p[i]) * x + float(sampler.q[i]) * f
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # the scheduler's own numbers are float32


def test_noise_levels_are_those_that_the_scheduler_adds():
    scheduler = DDIMScheduler(set_alpha_to_one=False)
    sampler = build_sampler(scheduler, 7)
    clean, noise = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = scheduler.add_noise(clean, noise, sampler.timesteps)
    ours = sampler.alpha[:-1, None] * clean + sampler.sigma[:-1, None] * noise
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    # The end of the chain has the level of the model's first timestep, or of clean latents.
    torch.testing.assert_close(sampler.alpha[-1] ** 2, scheduler.alphas_cumprod[0].double())
    assert build_sampler(DDIMScheduler(set_alpha_to_one=True), 7).sigma[-1] == 0


def test_flow_levels_mix_latents_and_noise():
    sampler = build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
    assert torch.equal(sampler.alpha + sampler.sigma, torch.ones(6).double())
    # Along a straight path x = (1 - σ)·x0 + σ·z the velocity is z - x0, so x̂0 is x0 and the chain stays on it.
    clean, noise = torch.randn(2, 4, dtype=torch.float64)
    path = sampler.alpha[:, None] * clean + sampler.sigma[:, None] * noise
    for i in range(5):
        torch.testing.assert_close(sampler.p[i] * path[i] + sampler.q[i] * (noise - clean), clean)
        following = sampler.a[i] * path[i] + sampler.b.diagonal()[i] * (noise - clean)
        torch.testing.assert_close(following, path[i + 1], rtol=1e-6, atol=1e-6)


def test_eta_one_from_pure_noise_is_the_limit_of_little_noise_less():
    """Zero terminal SNR: the scheduler's own coefficients are not numbers at the first step."""
    options = dict(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    scheduler = DDIMScheduler(**options)
    exact, near = build_sampler(scheduler, 5, 1.0), build_sampler(scheduler, 5, 1 - 1e-5)
    for name in "abs":
        torch.testing.assert_close(getattr(exact, name), getattr(near, name), rtol=0, atol=0.01)
    # What a step leaves of a clean picture and of noise is the next level.
    mean = exact.a[0] * noise_of(exact) + exact.b.diagonal()[0] * -1.0  # v = -x0 at pure noise, for x0 = 1
    torch.testing.assert_close(mean, exact.alpha[1])
    torch.testing.assert_close(exact.s.diagonal()[0], exact.sigma[1])


def noise_of(sampler):
    return sampler.sigma[0] * 0.3


@pytest.mark.parametrize(("of_another_world", "message"), [
    (EDMDPMSolverMultistepScheduler(), "the noise levels of its EDMDPMSolverMultistepScheduler are neither"),
    (EDMEulerScheduler(prediction_type="v_prediction"), "the noise levels of its EDMEulerScheduler are neither"),
    (IPNDMScheduler(), "the noise levels of its IPNDMScheduler are neither"),
    (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "EulerDiscreteScheduler are"),
    (DPMSolverMultistepScheduler(use_flow_sigmas=True), "the noise levels of its DPMSolverMultistepScheduler are"),
    ])  # fmt: skip
def test_a_scheduler_of_another_world_is_refused(of_another_world, message):
    with pytest.raises(ConfigError, match=rf"^pretrained\.model: .*{message}"):
        build_sampler(of_another_world, 5, 0.0)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_flow_models_other_solvers_name_the_shift_of_its_noise_levels(cls):
    scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    found, expected = build_sampler(scheduler, 5, 0.0), build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
    assert torch.equal(found.sigma, expected.sigma) and torch.equal(found.b, expected.b)
    assert not torch.equal(found.b, build_sampler(FlowMatchEulerDiscreteScheduler(), 5).b)


def test_pure_noise_needs_a_network_that_says_something_of_the_picture():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    with pytest.raises(ConfigError, match=r"starts from pure noise .* predicts 'epsilon' gives no clean image"):
        build_sampler(DDIMScheduler(**options), 5, 0.0)
    for kind in ("v_prediction", "sample"):
        chain = build_sampler(DDIMScheduler(prediction_type=kind, **options), 5, 0.5)
        assert all(numbers.isfinite().all() for numbers in (chain.a, chain.b, chain.s, chain.p, chain.q))
