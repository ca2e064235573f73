"""The sampling chain as numbers: N steps, each of them one network call and a linear map.

    x[i+1] = a[i]·x[i] + Σ_{m≤i} b[i,m]·f[m] + Σ_{k≤i} s[i,k]·z[k]          i = 0 … N-1
    f[i]   = f(scale[i]·x[i], t[i], c)
    x̂0[i]  = p[i]·x[i] + q[i]·f[i]                                the clean latents that step i predicts

`f` is the denoiser's output after guidance, and `z` is standard normal noise. Every usual scheduler of diffusers has
this form. In a one-step method, such as DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12) or Euler's, b and s are
diagonal. A multistep method, such as DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), uses earlier outputs again. A
method of second order, such as Heun's, makes two calls for one of its own steps, and each of them is a step here.

The coefficients need no formulas, because a run of the scheduler on unit tensors gives them (tables.py). Only the noise
in a flow's chain, which policy gradients need and Euler's method lacks, has a formula here (`add_noise`).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from alignprop.method.schedulers import is_flow, make_scheduler
from alignprop.method.tables import Table, read_table
from alignprop.models.base import Model
from alignprop.settings.errors import ConfigError
from alignprop.settings.samplers import parse_options, takes_eta


@dataclass(frozen=True)
class Sampler:
    """The coefficients of a sampling chain of N steps. A field has shape [N] unless it says otherwise.

    Attributes:
        timesteps: the network's time input, noisiest first; int64, or float32 if the scheduler has times between the
            timesteps of training. Half precision rounds these times.
        a: float64; the weight of the latents in the next latents.
        b: float64 [N, N], lower-triangular; the weights of the network's outputs in the next latents. A vector [N]
            stands for the diagonal of a one-step method.
        s: float64 [N, N], lower-triangular; the weights of fresh noise in the next latents; or a vector, like b.
        p: float64; the weight of the latents in x̂0.
        q: float64; the weight of the network's output in x̂0.
        alpha: float64 [N+1]; the weight of the clean latents in x[i] ~ alpha[i]·x0 + sigma[i]·z.
        sigma: float64 [N+1]; the weight of the noise in x[i].
        scale: float64; what the latents are multiplied by before the network sees them. None is 1.
        start: the standard deviation of x[0].
        draws: bool; whether step i draws noise. None means that every step does, if s is not zero.
    """

    timesteps: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor
    p: torch.Tensor | None = None
    q: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    sigma: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    start: float = 1.0
    draws: torch.Tensor | None = None

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("b", "s")}
        tables = {name: values.diag() if values.dim() == 1 else values for name, values in given.items()}
        if self.scale is None:
            tables["scale"] = torch.ones(len(self.timesteps), dtype=torch.float64)
        if self.draws is None:
            tables["draws"] = (tables["s"] != 0).any().expand(len(self.timesteps))
        for name, values in tables.items():
            object.__setattr__(self, name, values)  # the way to fill a field of a frozen dataclass

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def is_stochastic(self) -> bool:
        return bool(self.draws.any())

    @property
    def is_one_step(self) -> bool:
        """Whether the next latents depend on the newest output and the newest noise only."""
        return not (self.b.tril(-1).any() or self.s.tril(-1).any())

    @property
    def most_waiting(self) -> int:
        """The largest number of earlier outputs and noises that wait at once for the steps that use them again."""
        return max(len(self.still_needed(i)) for i in range(self.num_steps))

    def weights(self, i: int) -> tuple[float, dict[int, float], dict[int, float]]:
        """Returns a[i], and the entries of b[i] and s[i] that are not zero, by their index."""
        used = ({m: float(row[m]) for m in row.nonzero().flatten().tolist()} for row in (self.b[i], self.s[i]))
        return float(self.a[i]), *used

    def within(self, interval: tuple[float, float]) -> Callable[[torch.Tensor], bool] | None:
        """Returns what says whether a timestep is in a part of the chain, (from, to) in shares; None for all of it."""
        if tuple(interval) == (0, 1):
            return None
        middle = (torch.arange(self.num_steps) + 0.5) / self.num_steps
        inside = set(self.timesteps[(interval[0] <= middle) & (middle < interval[1])].tolist())
        return lambda timestep: timestep.item() in inside

    def still_needed(self, i: int) -> set[int]:
        """Returns the indices of the outputs and noises that steps after step i use."""
        later = self.b[i + 1 :].any(dim=0) | self.s[i + 1 :].any(dim=0)
        return set(later[: i + 1].nonzero().flatten().tolist())


def build_sampler(
    scheduler, num_inference_steps: int, eta: float = 0.0, name: str = "ddim", options: str = "",
    field: str = "num_inference_steps", sampler_field: str = "sampler", **schedule,
) -> Sampler:  # fmt: skip
    """Builds the chain of a sampler, for a flow-matching model or a discrete-time diffusion model.

    Args:
        scheduler: the diffusers scheduler of the model.
        num_inference_steps: the number of steps, at least 1. A method of second order makes up to two calls for each.
        eta: how much noise a step of DDIM, of TCD or of a flow's Euler chain adds. 0 is the deterministic chain, and 1
            adds as much noise as ancestral (DDPM) sampling.
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
    alpha, sigma, p, q = _levels(solver, flow)
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{field} = {steps} with the sampler {name!r}: diffusers says: {reason}") from error
    if len(solver.timesteps) > 1 and solver.timesteps[0] <= solver.timesteps[-1]:
        raise ConfigError(f"the sampler {name!r} does not go from noise to pictures, as a sampler has to")
    if solver.timesteps.max() >= trained and not solver.timesteps.is_floating_point():
        raise ConfigError(
            f"{field} = {steps} is too many for the model's timestep_spacing = "
            f"{solver.config.timestep_spacing!r} with steps_offset = {solver.config.steps_offset}; try half as many"
        )


def _levels(solver, flow: bool) -> tuple[torch.Tensor, ...]:
    """Returns α and σ of x[0] … x[N] as the network sees them, scale·x, and p and q for such latents; float64."""
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
