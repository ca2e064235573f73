"""The sampling chain as numbers: every step is one affine map around one network call.

    x[i+1] = a[i]·x[i] + b[i]·f(x[i], t[i], c) + s[i]·z[i]          i = 0 … N-1

`f` is the denoiser's output after guidance and `z` is standard normal noise. DDIM with epsilon- or v-prediction
and any eta has this form (Song et al. 2021, arXiv 2010.02502, eq. 12), so its coefficients need no formulas of
our own: `scheduler.step` is affine, and calling it with ones and zeros reads them off exactly.
"""

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

from alignprop.settings import ConfigError


@dataclass(frozen=True)
class Sampler:
    """The coefficients of one sampling chain of N steps; all fields have shape [N].

    Attributes:
        timesteps: the network's time input, int64, noisiest first.
        a, b, s: float64; the weights of the latents, of the network's output and of fresh noise.
    """

    timesteps: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def is_stochastic(self) -> bool:
        return bool((self.s != 0).any())


def ddim_sampler(scheduler, num_inference_steps: int, eta: float = 0.0) -> Sampler:
    """Reads the DDIM chain off a diffusers scheduler's configuration.

    Args:
        scheduler: any diffusers scheduler of a discrete-time diffusion model; its noise schedule, timestep spacing
            and prediction type are used.
        num_inference_steps: N, from 1 to the number of training timesteps.
        eta: 0 is the deterministic chain, 1 adds as much noise as ancestral (DDPM) sampling.

    Raises:
        ConfigError: the prediction type is unknown to DDIM, or the model has no timesteps for so many steps.
    """
    # A clipped or thresholded x̂0 would make the step non-linear; latent diffusion models do neither.
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    if ddim.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"pretrained.model: its scheduler predicts {ddim.config.prediction_type!r}; "
            "DDIM needs 'epsilon', 'v_prediction' or 'sample'"
        )
    if num_inference_steps > ddim.config.num_train_timesteps:
        raise ConfigError(
            f"num_inference_steps = {num_inference_steps} must not exceed the model's {ddim.config.num_train_timesteps}"
        )
    ddim.set_timesteps(num_inference_steps)
    if ddim.timesteps.max() >= ddim.config.num_train_timesteps:
        raise ConfigError(
            f"num_inference_steps = {num_inference_steps} is too many for the model's timestep_spacing = "
            f"{ddim.config.timestep_spacing!r} with steps_offset = {ddim.config.steps_offset}; half of them will do"
        )
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def response(t, sample, model_output, noise):
        return ddim.step(model_output, t, sample, eta=eta, variance_noise=noise).prev_sample

    return Sampler(
        timesteps=ddim.timesteps.long(),
        a=torch.cat([response(t, one, zero, zero) for t in ddim.timesteps]),
        b=torch.cat([response(t, zero, one, zero) for t in ddim.timesteps]),
        s=torch.cat([response(t, zero, zero, one) for t in ddim.timesteps]),
    )
