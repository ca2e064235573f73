"""Builds the sampling chain (chain.py) of a model from a scheduler of diffusers.

A run of the scheduler on unit tensors gives the coefficients (tables.py). Only the noise in a flow's chain, which
policy gradients need and Euler's method lacks, has a formula here (`add_noise`).
"""

import inspect
from dataclasses import replace

import torch

from alignprop.method.chain import Sampler
from alignprop.method.schedulers import is_flow, make_scheduler, noise_levels
from alignprop.method.tables import Table, read_table
from alignprop.models.base import Model
from alignprop.settings.errors import ConfigError
from alignprop.settings.samplers import parse_options, takes_eta
from rewards.errors import first_line


def build_sampler(
    scheduler, num_inference_steps: int, eta: float = 0.0, name: str = "ddim", options: str = "",
    field: str = "num_inference_steps", sampler_field: str = "sampler", **schedule,
) -> Sampler:  # fmt: skip
    """Builds the chain of a sampler, for a flow-matching model or a discrete-time diffusion model.

    Args:
        scheduler: the diffusers scheduler of the model.
        num_inference_steps: the number of steps, at least 1. A method of second order makes up to two calls for each.
        eta: how much noise a step of DDIM, of TCD or of a flow's Euler chain adds. 0 is the deterministic chain. 1 adds
            as much noise as ancestral (DDPM) sampling, and with TCD all noise is fresh.
        name: see `make_scheduler`.
        options: options of the sampler, "NAME=VALUE, …", which replace those of the model's files.
        field: the name of `num_inference_steps` in messages.
        sampler_field: the name of the field of `name` in messages.
        schedule: further arguments of the `set_timesteps` of a flow's scheduler: `mu`, if the shift of the noise levels
            depends on the size of the picture, and `sigmas`, if the model's pipeline sets the noise levels itself.

    Raises:
        ConfigError: the scheduler's noise levels are of neither kind, for example EDM's; the sampler is not for this
            kind of model; or the model has too few timesteps for so many steps. Or the chain starts from pure noise,
            where the prediction type gives no x̂0.
    """
    _check_kind(scheduler)
    flow = is_flow(scheduler)
    if flow and scheduler.config.get("use_dynamic_shifting") and schedule.get("mu") is None:
        raise ConfigError(
            "pretrained.model: its scheduler shifts the noise levels with the size of the picture "
            "(use_dynamic_shifting), and no shift (mu) is known for it"
        )
    solver = make_scheduler(scheduler, name, parse_options(options), schedule.get("mu"), sampler_field)
    _set_timesteps(solver, num_inference_steps, name, field, schedule)
    has_eta = takes_eta(type(solver))
    own_noise = flow and type(solver).__name__ == "FlowMatchEulerDiscreteScheduler"
    if eta and not has_eta and not own_noise:
        raise ConfigError(f"eta = {eta} has no effect with {sampler_field} = {name!r}; it must be 0")
    alpha, sigma, p, q = noise_levels(solver, flow)
    table = _table(solver, {"eta": eta} if has_eta else {}, f"{sampler_field} = {name!r}")
    to_x = torch.cat([1 / table.scale, torch.ones(1, dtype=torch.float64)])
    sampler = Sampler(
        table.timesteps, table.a, table.b, table.s, table.scale * p, q, to_x * alpha, to_x * sigma, table.scale,
        float(getattr(solver, "init_noise_sigma", 1.0)), table.draws,
    )  # fmt: skip
    return add_noise(sampler, eta) if own_noise else sampler


def _table(solver, step_options: dict, chosen: str) -> Table:
    try:
        return read_table(solver, **step_options)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = first_line(error)
        raise ConfigError(f"{chosen}: {type(solver).__name__} makes no sampling chain here: {reason}") from error


def chain_of(model: Model, num_inference_steps: int, **options) -> Sampler:
    """Builds the sampling chain of a model; `build_sampler` explains the options and the errors."""
    schedule = model.schedule(num_inference_steps)
    return build_sampler(model.scheduler, num_inference_steps, **options, **schedule)


def add_noise(sampler: Sampler, eta: float) -> Sampler:
    """Adds fresh noise to the steps of a flow's Euler chain, and keeps the distribution at every noise level.

        x[i+1] = α[i+1]·x̂0 + √(σ[i+1]² - s²)·ê + s·z,    ê = x[i] + (1 - σ[i])·f, the noise that f predicts,
        s = eta·σ[i+1]·√(1 - (α[i]·σ[i+1] / (α[i+1]·σ[i]))²)

    This is DDIM's step (eq. 12 and 16) for any α and σ. A step to σ[i+1] = 0, such as the last one, gets no noise. In
    the limit of small steps the chain is the stochastic differential equation of Flow-GRPO (Liu et al. 2025, arXiv
    2505.05470) with the noise level √2·eta.

    Args:
        sampler: the chain of Euler's method.
        eta: from 0, the deterministic chain, to 1, ancestral sampling.
    """
    if not eta:
        return sampler
    alpha, sigma = sampler.alpha, sampler.sigma
    kept = alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])
    s = eta * sigma[1:] * (1 - kept**2).sqrt()
    direction = (sigma[1:] ** 2 - s**2).sqrt()
    a, b = alpha[1:] + direction, direction * alpha[:-1] - alpha[1:] * sigma[:-1]
    return replace(sampler, a=a, b=b, s=s, draws=None)


def _check_kind(scheduler) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    is_discrete = hasattr(scheduler, "alphas_cumprod") and config.get("timestep_type", "discrete") == "discrete"
    if not is_flow(scheduler) and (not is_discrete or config.get("use_flow_sigmas")):
        raise ConfigError(
            f"pretrained.model: the noise levels of its {name} are neither those of discrete-time diffusion nor those "
            "of flow matching, the two kinds of model that can be trained"
        )
    if not is_flow(scheduler) and config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"pretrained.model: its scheduler predicts {config.prediction_type!r}; "
            "it must be 'epsilon', 'v_prediction' or 'sample'"
        )


def _set_timesteps(solver, steps: int, name: str, field: str, schedule: dict) -> None:
    """Calls `set_timesteps`, with those arguments of `schedule` that this scheduler has."""
    trained = solver.config.num_train_timesteps
    if steps > trained:
        raise ConfigError(f"{field} = {steps} must not exceed the model's {trained} timesteps")
    takes = inspect.signature(solver.set_timesteps).parameters
    own = {key: value for key, value in schedule.items() if key in takes}
    if not solver.config.get("use_dynamic_shifting"):
        own.pop("mu", None)
    try:
        solver.set_timesteps(steps, **own)
    except (ValueError, NotImplementedError, ImportError, AssertionError, IndexError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{field} = {steps} with the sampler {name!r} and its options: diffusers says: {reason}"
        ) from error
    if len(solver.timesteps) > 1 and solver.timesteps[0] <= solver.timesteps[-1]:
        raise ConfigError(f"the sampler {name!r} does not go from noise to pictures, as a sampler has to")
    if solver.timesteps.max() >= trained and not solver.timesteps.is_floating_point():
        raise ConfigError(
            f"{field} = {steps} is too many for the model's timestep_spacing = "
            f"{solver.config.timestep_spacing!r} with steps_offset = {solver.config.steps_offset}; try half as many"
        )
