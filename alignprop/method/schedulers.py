"""The diffusers scheduler of a sampling chain: the one that `sampler` and `sampler_options` name, for a given model."""

import inspect
import math

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from alignprop.settings.errors import ConfigError
from alignprop.settings.samplers import check_options, scheduler_class


def is_flow(scheduler) -> bool:
    """Says whether a scheduler is of a flow-matching model."""
    config = scheduler.config
    on_flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    return type(scheduler).__name__.startswith("FlowMatch") or bool(on_flow)


def make_scheduler(scheduler, name: str, options: dict, mu: float | None = None, field: str = "sampler"):
    """Makes the scheduler of a chain from the one that the model came with.

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
    flow, config = is_flow(scheduler), dict(scheduler.config)
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
    except (NotImplementedError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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
