"""The sampling chain as numbers: every step is one affine map around one network call.

    x[i+1] = a[i]·x[i] + b[i]·f(x[i], t[i], c) + s[i]·z[i]          i = 0 … N-1
    x̂0[i]  = p[i]·x[i] + q[i]·f(x[i], t[i], c)                       the clean latents that step i predicts

`f` is the denoiser's output after guidance, and `z` is standard normal noise. DDIM with epsilon- or v-prediction
and any eta has this form (Song et al. 2021, arXiv 2010.02502, eq. 12), and so has Euler's method for flow matching
(Lipman et al. 2023, arXiv 2210.02747). Their coefficients need no formulas here, because `scheduler.step` is affine:
calling it with ones and zeros gives them exactly. Only the noise in a flow's chain, which policy gradients need and
Euler's method lacks, has a formula here (`add_noise`).
"""

from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from alignprop.settings.errors import ConfigError


@dataclass(frozen=True)
class Sampler:
    """The coefficients of one sampling chain of N steps. A field has shape [N] unless it says otherwise.

    Attributes:
        timesteps: the network's time input, noisiest first; int64, or float32 for flow matching, because half precision
            rounds these times.
        a: float64; the weight of the latents in the next latents.
        b: float64; the weight of the network's output in the next latents.
        s: float64; the weight of fresh noise in the next latents.
        p: float64; the weight of the latents in x̂0.
        q: float64; the weight of the network's output in x̂0.
        alpha: float64 [N+1]; the weight of the clean latents in x[i] ~ alpha[i]·x0 + sigma[i]·z.
        sigma: float64 [N+1]; the weight of the noise in x[i].
    """

    timesteps: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor
    p: torch.Tensor | None = None
    q: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    sigma: torch.Tensor | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def is_stochastic(self) -> bool:
        return bool((self.s != 0).any())


_ONE, _ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def build_sampler(
    scheduler, num_inference_steps: int, eta: float, field: str = "num_inference_steps", **schedule
) -> Sampler:  # fmt: skip
    """Builds the chain for a diffusers scheduler, of a flow-matching model or of a discrete-time diffusion model.

    Args:
        scheduler: the diffusers scheduler of the model.
        num_inference_steps: see `ddim_sampler`.
        eta: see `ddim_sampler` or, for a flow, `add_noise`.
        field: see `ddim_sampler`.
        schedule: see `flow_sampler`; used for a flow only.

    Raises:
        ConfigError: the scheduler is of neither kind, for example EDM's. Also the errors of `ddim_sampler` and
            `flow_sampler`.
    """
    name, config = type(scheduler).__name__, scheduler.config
    on_flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    is_flow = name.startswith("FlowMatch") or on_flow
    is_discrete = hasattr(scheduler, "alphas_cumprod") and config.get("timestep_type", "discrete") == "discrete"
    if not is_flow and (not is_discrete or config.get("use_flow_sigmas")):
        raise ConfigError(
            f"pretrained.model: the noise levels of its {name} are neither those of discrete-time diffusion nor those "
            "of flow matching, the two kinds of model that can be trained"
        )
    if not is_flow:
        return ddim_sampler(scheduler, num_inference_steps, eta, field)
    return add_noise(flow_sampler(scheduler, num_inference_steps, **schedule), eta)


def add_noise(sampler: Sampler, eta: float) -> Sampler:
    """Adds fresh noise to the steps of a flow's chain, and keeps the distribution at every noise level.

        x[i+1] = α[i+1]·x̂0 + √(σ[i+1]² - s²)·ê + s·z,    ê = x[i] + (1 - σ[i])·f, the noise that f predicts,
        s = eta·σ[i+1]·√(1 - (α[i]·σ[i+1] / (α[i+1]·σ[i]))²)

    This is DDIM's step (eq. 12 and 16) for any α and σ. A step to σ[i+1] = 0, such as the last one, gets no noise. In
    the limit of small steps the chain is the stochastic differential equation of Flow-GRPO (Liu et al. 2025, arXiv
    2505.05470) with the noise level √2·eta.

    Args:
        sampler: the chain of `flow_sampler`.
        eta: from 0, the deterministic chain, to 1, ancestral sampling.
    """
    if not eta:
        return sampler
    alpha, sigma = sampler.alpha, sampler.sigma
    kept = alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])
    s = eta * sigma[1:] * (1 - kept**2).sqrt()
    direction = (sigma[1:] ** 2 - s**2).sqrt()
    a, b = alpha[1:] + direction, direction * alpha[:-1] - alpha[1:] * sigma[:-1]
    return replace(sampler, a=a, b=b, s=s)


def flow_sampler(scheduler, num_inference_steps: int, **schedule) -> Sampler:
    """Reads the chain of Euler's method from the configuration of a flow-matching scheduler.

        x[i+1] = x[i] + (σ[i+1] - σ[i])·f(x[i], 1000·σ[i], c)

    Args:
        scheduler: any diffusers scheduler of a flow-matching model. Its shift of the noise levels is used.
        num_inference_steps: N, at least 1.
        schedule: further arguments of the scheduler's `set_timesteps`: `mu`, if the shift depends on the size of the
            picture, and `sigmas`, if the model's pipeline sets the noise levels itself.

    Raises:
        ConfigError: the shift depends on the size of the picture, and there is no `mu`.
    """
    options = {"stochastic_sampling": False}  # stochastic sampling draws noise inside the scheduler
    if "flow_shift" in scheduler.config:  # the name of the shift in solvers for both kinds of model
        options["shift"] = scheduler.config.flow_shift
    euler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **options)
    if euler.config.use_dynamic_shifting and schedule.get("mu") is None:
        raise ConfigError(
            "pretrained.model: its scheduler shifts the noise levels with the size of the picture "
            "(use_dynamic_shifting), and no shift (mu) is known for it"
        )

    def responses(sample, model_output):
        euler.set_timesteps(num_inference_steps, **schedule)  # resets the scheduler's count of its steps to 0
        return torch.cat([euler.step(model_output, t, sample).prev_sample for t in euler.timesteps])

    a, b = responses(_ONE, _ZERO), responses(_ZERO, _ONE)
    sigma = euler.sigmas.double()
    return Sampler(
        timesteps=euler.timesteps, a=a, b=b, s=torch.zeros_like(a),
        p=torch.ones_like(a), q=-sigma[:-1], alpha=1 - sigma, sigma=sigma,
    )  # fmt: skip


def ddim_sampler(scheduler, num_inference_steps: int, eta: float = 0.0, field: str = "num_inference_steps") -> Sampler:
    """Reads the DDIM chain from the configuration of a diffusers scheduler.

    Args:
        scheduler: any diffusers scheduler of a discrete-time diffusion model. Its noise schedule, timestep spacing
            and prediction type are used.
        num_inference_steps: N, from 1 to the number of training timesteps.
        eta: 0 is the deterministic chain, 1 adds as much noise as ancestral (DDPM) sampling.
        field: the name of `num_inference_steps` in error messages.

    Raises:
        ConfigError: DDIM does not know the beta schedule or the prediction type. Or the chain starts from pure noise,
            where the prediction type gives no x̂0. Or the model has too few timesteps for so many steps.
    """
    # Clipping or thresholding x̂0 makes the step non-linear. Latent diffusion models do neither.
    try:
        ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    except NotImplementedError as error:
        raise ConfigError(f"pretrained.model: its scheduler's beta_schedule is unknown to DDIM ({error})") from error
    if ddim.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"pretrained.model: its scheduler predicts {ddim.config.prediction_type!r}; "
            "DDIM needs 'epsilon', 'v_prediction' or 'sample'"
        )
    if num_inference_steps > ddim.config.num_train_timesteps:
        raise ConfigError(
            f"{field} = {num_inference_steps} must not exceed the model's {ddim.config.num_train_timesteps} timesteps"
        )
    ddim.set_timesteps(num_inference_steps)
    if ddim.timesteps.max() >= ddim.config.num_train_timesteps:
        raise ConfigError(
            f"{field} = {num_inference_steps} is too many for the model's timestep_spacing = "
            f"{ddim.config.timestep_spacing!r} with steps_offset = {ddim.config.steps_offset}; try half as many"
        )

    def response(t, sample, model_output, noise):
        step = ddim.step(model_output, t, sample, eta=eta, variance_noise=noise)
        return torch.stack([step.prev_sample, step.pred_original_sample])

    def responses(*inputs):
        return torch.cat([response(t, *inputs) for t in ddim.timesteps], dim=1)

    (a, p), (b, q), (s, _) = (responses(*unit.split(1)) for unit in torch.eye(3, dtype=torch.float64))
    squares = torch.cat([ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod.reshape(1)]).double()
    alpha, sigma = squares.sqrt(), (1 - squares).sqrt()
    # If the chain starts from pure noise (zero terminal SNR) and eta = 1, x[1] keeps nothing of x[0]'s noise. There
    # rounding makes diffusers take the square root of -1e-8, so x[1] = α[1]·x̂0 + σ[1]·z is written out instead.
    rounded = a.isnan()
    a, b = (torch.where(rounded, alpha[1:] * x, y) for x, y in ((p, a), (q, b)))
    s = torch.where(rounded, sigma[1:], s)
    if not all(numbers.isfinite().all() for numbers in (a, b, s, p, q)):
        raise ConfigError(
            "pretrained.model: its scheduler starts from pure noise (rescale_betas_zero_snr), where a network that "
            f"predicts {ddim.config.prediction_type!r} gives no clean image; such a chain needs "
            "'v_prediction' or 'sample'"
        )
    return Sampler(timesteps=ddim.timesteps.long(), a=a, b=b, s=s, p=p, q=q, alpha=alpha, sigma=sigma)
