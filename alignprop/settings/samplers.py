"""The names and options of samplers: what `sampler` and `sampler_options` of a configuration may say."""

import ast
import difflib
import inspect
import math
import re
from typing import Any

from alignprop.settings.errors import ConfigError

# What the model's files say of its noise is no choice of the sampler, and a clipped step is not linear.
OF_THE_MODEL = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "use_flow_sigmas", "timestep_type", "sigma_data",
)  # fmt: skip
HIGHEST = {"solver_order": 3, "predictor_order": 4, "corrector_order": 4}  # of orders; UniPC has no highest one
NOT_LINEAR = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
USUAL = (
    "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete",
    "EulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "HeunDiscrete",
    "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
)  # fmt: skip
NICKNAMES = {
    "dpm++": "DPMSolverMultistep", "dpm++ 2m": "DPMSolverMultistep", "dpm-solver++": "DPMSolverMultistep",
    "euler": "EulerDiscrete", "euler a": "EulerAncestralDiscrete", "euler_a": "EulerAncestralDiscrete",
    "heun": "HeunDiscrete", "lms": "LMSDiscrete", "dpm2": "KDPM2Discrete", "dpm2 a": "KDPM2AncestralDiscrete",
    "unipc": "UniPCMultistep", "deis": "DEISMultistep", "plms": "PNDM", "sa-solver": "SASolver",
}  # fmt: skip


def scheduler_class(name: str, field: str = "sampler") -> type:
    """Returns the diffusers class that `name` names, with or without the ending "Scheduler".

    Raises:
        ConfigError: diffusers has no such scheduler.
    """
    import diffusers

    full = name if name.endswith("Scheduler") else f"{name}Scheduler"
    known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax"))
    if full not in known:
        near = difflib.get_close_matches(name.removesuffix("Scheduler"), USUAL, n=1, cutoff=0.75)
        meant = NICKNAMES.get(name.lower()) or (near[0] if near else None)
        hint = f"did you mean {meant!r}?" if meant else f"those that usually work: {', '.join(USUAL)}"
        raise ConfigError(f"{field} = {name!r} must be 'ddim', 'pipeline' or a scheduler of diffusers; {hint}")
    return getattr(diffusers, full)


def parse_options(text: str, field: str = "sampler_options") -> dict[str, Any]:
    """ "use_karras_sigmas=True, solver_order=3" -> {"use_karras_sigmas": True, "solver_order": 3}.

    A value may be a list in brackets.

    Raises:
        ConfigError: an option is not NAME=VALUE.
    """
    options = {}
    for part in filter(None, map(str.strip, re.split(r",(?![^\[]*\])", text))):  # no comma of a list
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise ConfigError(f"{field} = {text!r} must be NAME=VALUE, separated by commas; {part!r} is not")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def check_options(cls: type, options: dict[str, Any], field: str = "sampler_options") -> None:
    """Raises a ConfigError if an option is not one of the scheduler's, or has a value that it cannot have."""
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
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
        if name in HIGHEST:
            highest = math.inf if cls.__name__ == "UniPCMultistepScheduler" else HIGHEST[name]
            if not 1 <= value <= highest:
                limits = f"from 1 to {highest}" if highest < math.inf else "of at least 1"
                raise ConfigError(f"{field}: {name} = {value} must be a whole number {limits}")


def takes_eta(cls: Any) -> bool:
    """Says whether a step of this scheduler has the option `eta`."""
    return hasattr(cls, "step") and "eta" in inspect.signature(cls.step).parameters


def check_sampler(name: str, options: str, eta: float, field: str) -> None:
    """Checks a sampler as far as this is possible without its model.

    Args:
        name: the value of `field`.
        options: the value of the field of its options.
        eta: the value of `eta`.
        field: "sampler" or "train.sampler".

    Raises:
        ConfigError: there is no such sampler, it has no such option, or `eta` has no effect on it.
    """
    parsed = parse_options(options, f"{field}_options")
    if name in ("ddim", "pipeline"):
        return
    cls = scheduler_class(name, field)
    check_options(cls, parsed, f"{field}_options")
    if eta and not (takes_eta(cls) or cls.__name__ == "FlowMatchEulerDiscreteScheduler"):
        raise ConfigError(f"eta = {eta} has no effect with {field} = {name!r}; it must be 0")
