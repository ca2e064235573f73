"""The diffusers scheduler that `sampler` and `sampler_options` name, made for a given model, and its noise levels."""

import inspect
import math

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from alignprop.settings.errors import ConfigError
from alignprop.settings.samplers import OF_THE_MODEL, check_options, scheduler_class
from rewards.errors import first_line


def is_flow(scheduler) -> bool:
    """Says whether a scheduler is of a flow-matching model."""
    config = scheduler.config
    on_flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    return type(scheduler).__name__.startswith("FlowMatch") or bool(on_flow)


def make_scheduler(scheduler, name: str, options: dict, mu: float | None = None, field: str = "sampler"):
    """Makes the scheduler of a chain from the one that the model came with, as `from_config` of diffusers does.

    A field that the model's files leave out has the default of the new scheduler, unless it describes the noise that
    the model was trained with.

    Args:
        scheduler: the model's scheduler; its configuration describes the noise that the model was trained with.
        name: "ddim", which for a flow-matching model is Euler's method; "pipeline", the class that the model came with;
            or the name of a scheduler of diffusers.
        options: options of the scheduler, which replace those of the model's files.
        mu: the shift of a flow's noise levels, if it depends on the size of the picture.
        field: the name of the field of `name`, for messages.

    Raises:
        ConfigError: the scheduler is not for this kind of model, or refuses an option.
    """
    flow, left_out = is_flow(scheduler), set(scheduler.config.get("_use_default_values", ())) - set(OF_THE_MODEL)
    config = {name: value for name, value in scheduler.config.items() if name not in left_out}
    first = FlowMatchEulerDiscreteScheduler if flow else DDIMScheduler
    cls = {"ddim": first, "pipeline": type(scheduler)}.get(name) or scheduler_class(name, field)
    check_options(cls, options, f"{field}_options")
    takes = inspect.signature(cls).parameters
    config |= {"clip_sample": False, "thresholding": False, "stochastic_sampling": False}
    if flow:
        config |= _flow_options(config, takes, mu)
    stranger = ConfigError(
        f"{field} = {name!r}: {cls.__name__} is not for a model of "
        f"{'flow matching' if flow else 'discrete-time diffusion'}, which this model is"
    )
    if flow != (cls.__name__.startswith("FlowMatch") or (flow and "use_flow_sigmas" in takes)):
        raise stranger
    try:
        solver = cls.from_config({k: v for k, v in config.items() if k in takes}, **options)
    except (NotImplementedError, ValueError, ImportError, TypeError, KeyError, AttributeError, NameError) as error:
        reason = first_line(error)
        raise ConfigError(f"{field} = {name!r}: {cls.__name__} says: {reason}") from error
    if not flow and not (hasattr(solver, "alphas_cumprod") and hasattr(solver, "step") and "prediction_type" in takes):
        raise stranger
    return solver


def _flow_options(config: dict, takes, mu: float | None) -> dict:
    """Returns how a scheduler of either kind is told that the model is a flow, and the shift of its noise levels."""
    shift = config.get("shift", config.get("flow_shift", 1.0))
    dynamic = bool(config.get("use_dynamic_shifting"))
    if dynamic and "use_dynamic_shifting" not in takes and mu is not None:
        shift, dynamic = math.exp(mu), False  # the two shifts are the same function of the noise level
    return {
        "shift": shift, "flow_shift": shift, "use_dynamic_shifting": dynamic,
        "use_flow_sigmas": True, "prediction_type": "flow_prediction",
    }  # fmt: skip


def noise_levels(solver, flow: bool) -> tuple[torch.Tensor, ...]:
    """Returns α and σ of x[0] … x[N] as the network sees them, [N+1] each, and p and q for such latents, [N] each.

    Args:
        solver: the scheduler after its `set_timesteps`.
        flow: whether the model is a flow-matching model.

    Raises:
        ConfigError: the chain starts from pure noise, where this prediction type gives no clean latents.
    """
    alpha, sigma = _flow_levels(solver) if flow else _diffusion_levels(solver)
    kind, a, s = "flow_prediction" if flow else solver.config.prediction_type, alpha[:-1], sigma[:-1]
    p, q = {
        "epsilon": (1 / a, -s / a),
        "v_prediction": (a, -s),
        "sample": (0 * a, 0 * a + 1),
        "flow_prediction": (0 * a + 1, -s),
    }[kind]
    if not (p.isfinite() & q.isfinite()).all():
        raise ConfigError(
            "pretrained.model: its scheduler starts from pure noise (rescale_betas_zero_snr), where a network that "
            f"predicts {kind!r} gives no clean image; such a chain needs 'v_prediction' or 'sample'"
        )
    return alpha, sigma, p, q


def _flow_levels(solver) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns α and σ of the latents that the network sees at each step, and of x[N]; float64 [N+1] each."""
    sigma = solver.sigmas.double()
    if len(sigma) != len(solver.timesteps) + 1:  # a method of second order has two calls a step
        times = solver.timesteps.double() / solver.config.num_train_timesteps
        sigma = torch.cat([times, sigma[-1:]])
    return 1 - sigma, sigma


def _diffusion_levels(solver) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns α and σ of the latents that the network sees at each step, and of x[N]; float64 [N+1] each.

    They are the solver's own levels, if it has one for each step. Otherwise they are those of its timesteps. The level
    at a time between two timesteps of training is interpolated in log(σ/α), as diffusers does.
    """
    own = getattr(solver, "sigmas", torch.empty(0)).double()  # σ/α
    if len(own) == len(solver.timesteps) + 1:
        return 1 / (1 + own**2).sqrt(), own / (1 + own**2).sqrt()
    squares, times = solver.alphas_cumprod.double(), solver.timesteps
    if times.is_floating_point():
        log_ratio = ((1 - squares) / squares).log() / 2
        below = times.double().floor().long().clamp(0, len(squares) - 1)
        above, share = (below + 1).clamp(max=len(squares) - 1), times.double() - below
        at_calls = torch.sigmoid(-2 * (log_ratio[below] * (1 - share) + log_ratio[above] * share))
    else:
        at_calls = squares[times.long()]
    final = torch.as_tensor(getattr(solver, "final_alpha_cumprod", 1.0)).double()
    squares = torch.cat([at_calls, final.reshape(1)])
    return squares.sqrt(), (1 - squares).sqrt()
