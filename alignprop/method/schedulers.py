"""The diffusers scheduler of a sampling chain: the one that `sampler` and `sampler_options` name, for a given model."""

import ast
import inspect
import math

import diffusers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from alignprop.settings.errors import ConfigError

# What the model's files say of its noise is no choice of the sampler, and a clipped step is not linear.
OF_THE_MODEL = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "use_flow_sigmas", "timestep_type", "sigma_data",
)  # fmt: skip
NOT_LINEAR = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def is_flow(scheduler) -> bool:
    """Says whether a scheduler is of a flow-matching model."""
    config = scheduler.config
    on_flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    return type(scheduler).__name__.startswith("FlowMatch") or bool(on_flow)


def scheduler_class(name: str, field: str = "sampler") -> type:
    """Returns the diffusers class that `name` names, with or without the ending "Scheduler".

    Raises:
        ConfigError: diffusers has no such scheduler.
    """
    full = name if name.endswith("Scheduler") else f"{name}Scheduler"
    known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax"))
    if full not in known:
        import difflib

        near = difflib.get_close_matches(full, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "examples: 'EulerDiscrete', 'DPMSolverMultistep', 'UniPC'"
        raise ConfigError(f"{field} = {name!r} must be 'ddim', 'pipeline' or a scheduler of diffusers; {hint}")
    return getattr(diffusers, full)


def parse_options(text: str, field: str = "sampler_options") -> dict:
    """ "use_karras_sigmas=True, solver_order=3" -> {"use_karras_sigmas": True, "solver_order": 3}.

    Raises:
        ConfigError: an option is not NAME=VALUE.
    """
    options = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise ConfigError(f"{field} = {text!r} must be NAME=VALUE, separated by commas; {part!r} is not")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def check_options(cls: type, options: dict, field: str = "sampler_options") -> None:
    """Raises a ConfigError if an option is not one of the scheduler's, or has a value of another type."""
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    allowed = [name for name in defaults if name not in (*OF_THE_MODEL, *NOT_LINEAR)]
    for name, value in options.items():
        if name in NOT_LINEAR:
            raise ConfigError(f"{field}: {name} cannot be used, because a sampler step has to be linear")
        if name in OF_THE_MODEL:
            raise ConfigError(f"{field}: {name} is a property of the model, which its files name")
        if name not in allowed:
            raise ConfigError(f"{field}: {cls.__name__} has no option {name}; it has {', '.join(allowed)}")
        default = defaults[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number if isinstance(default, float) else isinstance(value, type(default))
        if default is not None and (not fits or isinstance(value, bool) != isinstance(default, bool)):
            raise ConfigError(f"{field}: {name} = {value!r} must be of the type of its default, {default!r}")


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
    takes = inspect.signature(cls.__init__).parameters
    config |= {"clip_sample": False, "thresholding": False, "stochastic_sampling": False}
    if flow:
        config |= _flow_options(config, takes, mu)
    wanted = "flow matching" if flow else "discrete-time diffusion"
    if flow != (cls.__name__.startswith("FlowMatch") or (flow and "use_flow_sigmas" in takes)):
        raise ConfigError(f"{field} = {name!r}: {cls.__name__} is not for a model of {wanted}, which this model is")
    try:
        return cls.from_config({k: v for k, v in config.items() if k in takes}, **options)
    except (NotImplementedError, ValueError, ImportError) as error:
        raise ConfigError(f"{field} = {name!r}: {cls.__name__} says: {str(error).strip().splitlines()[0]}") from error


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
