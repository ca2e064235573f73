import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from alignprop.samplers import ddim_sampler
from alignprop.settings import ConfigError


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
    sampler = ddim_sampler(ddim, num_steps, eta)
    ddim.set_timesteps(num_steps)
    torch.testing.assert_close(sampler.timesteps, ddim.timesteps)
    for i, t in enumerate(ddim.timesteps):
        x, f, z = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        expected = ddim.step(f, t, x, eta=eta, variance_noise=z).prev_sample
        ours = float(sampler.a[i]) * x + float(sampler.b[i]) * f + float(sampler.s[i]) * z
        assert (ours - expected).norm() <= 1e-6 * expected.norm(), f"step {i}"


def test_only_a_stochastic_sampler_has_noise():
    assert not ddim_sampler(scheduler("epsilon"), 10, eta=0.0).is_stochastic
    assert ddim_sampler(scheduler("epsilon"), 10, eta=1.0).is_stochastic


def test_another_scheduler_of_the_same_model_gives_its_ddim_chain():
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    ours = ddim_sampler(PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **options), 10)
    expected = ddim_sampler(scheduler("epsilon"), 10)
    assert torch.equal(ours.timesteps, expected.timesteps)
    torch.testing.assert_close(ours.a, expected.a)


def test_clipping_configured_in_the_scheduler_does_not_bend_the_step():
    clipped = DDIMScheduler.from_config(scheduler("epsilon").config, clip_sample=True)
    torch.testing.assert_close(ddim_sampler(clipped, 10).b, ddim_sampler(scheduler("epsilon"), 10).b)


def test_unknown_prediction_type_is_refused_by_name():
    odd = scheduler("epsilon")
    odd.register_to_config(prediction_type="flow")
    with pytest.raises(ConfigError, match="'flow'"):
        ddim_sampler(odd, 10)


def test_more_steps_than_the_model_was_trained_with():
    with pytest.raises(ConfigError, match="num_inference_steps = 1001 must not exceed the model's 1000"):
        ddim_sampler(scheduler("epsilon"), 1001)


def test_so_many_steps_that_the_offset_leaves_the_schedule():
    with pytest.raises(ConfigError, match=r"num_inference_steps = 1000 is too many .* steps_offset = 1"):
        ddim_sampler(scheduler("epsilon"), 1000)
