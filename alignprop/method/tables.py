"""A diffusers scheduler as a table of numbers, which one run of the scheduler on unit tensors gives.

The usual schedulers are linear in the first noise x[0], in the network's outputs f[0] … f[N-1], and in fresh noise
z[0] … z[N-1]. So each of these sources gets a row of a batch, with a 1 in it where the source appears. After a run, the
rows hold the weight of each source in the latents before every network call.
"""

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.overrides import TorchFunctionMode

from alignprop.settings.errors import ConfigError

ROUNDING = 1e-13  # smaller weights, relative to the largest of their row, are rounding errors of float64


@dataclass(frozen=True)
class Table:
    """A run of N network calls: x[i+1] = a[i]·x[i] + Σ_{m≤i} b[i,m]·f[m] + Σ_{k≤i} s[i,k]·z[k].

    Attributes:
        timesteps: the network's time input at each call, [N].
        scale: the network is called with scale[i]·x[i]; float64 [N].
        a: float64 [N].
        b: float64 [N, N], lower-triangular.
        s: float64 [N, N], lower-triangular.
        draws: whether the scheduler draws noise after call i; bool [N].
    """

    timesteps: torch.Tensor
    scale: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor
    draws: torch.Tensor


def read_table(scheduler, **step_options) -> Table:
    """Reads the table of a scheduler after its `set_timesteps`; `step_options` are further arguments of its `step`.

    Raises:
        ConfigError: the steps are not finite numbers, or not linear in the sources.
    """
    n, name = len(scheduler.timesteps), type(scheduler).__name__
    sources = torch.eye(1 + 2 * n, dtype=torch.float64)  # x[0], then f[0] …, then z[0] …
    weights, scale, draws = _run(scheduler, sources, step_options)
    if not weights.isfinite().all():
        raise ConfigError(f"sampler: the steps of {name} with these options are not finite numbers")
    values = torch.linspace(-1, 2, 1 + 2 * n, dtype=torch.float64).cos().unsqueeze(-1)  # any numbers
    found, expected = _run(scheduler, values, step_options)[0].squeeze(1), weights @ values.squeeze(1)
    if (found - expected).abs().max() > 1e-6 * expected.abs().max():
        raise ConfigError(f"sampler: the steps of {name} with these options are not linear in the network's outputs")
    a, increments = _increments(weights)
    return Table(scheduler.timesteps, scale, a, increments[:, 1 : 1 + n], increments[:, 1 + n :], draws)


def _run(scheduler, sources: torch.Tensor, step_options: dict) -> tuple[torch.Tensor, ...]:
    """Runs a copy of the scheduler.

    Args:
        scheduler: the scheduler after its `set_timesteps`.
        sources: x[0], then the network's outputs, then the noises, as the rows of [sources, batch].
        step_options: further arguments of `step`.

    Returns:
        x[0] … x[N], float64 [N+1, batch]; what the network's latents are multiplied by in each step, float64 [N]; and
        whether noise was drawn in it, bool [N].
    """
    solver, n = deepcopy(scheduler), len(scheduler.timesteps)
    first, outputs, noises = sources[:, :, None].split([1, n, n])
    states, scale, draws = [first[0]], [], []
    for i, t in enumerate(solver.timesteps):
        scale.append(_input_scale(solver, t))  # some schedulers find their place in the schedule here
        with _ExactMode(noises[i]) as mode:
            states.append(solver.step(outputs[i], t, states[-1], **step_options).prev_sample)
        draws.append(mode.has_drawn)
    return torch.stack(states).squeeze(-1), torch.tensor(scale, dtype=torch.float64), torch.tensor(draws)


def _input_scale(scheduler, t) -> float:
    """Returns what the scheduler multiplies the network's latents by at timestep t."""
    one = torch.ones(1, dtype=torch.float64)
    return float(scheduler.scale_model_input(one, t)) if hasattr(scheduler, "scale_model_input") else 1.0


def _increments(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the weights in x[i+1] into a[i] times those in x[i] and an increment.

    a[i] is chosen so that the oldest source in x[i] is not in the increment. This source is x[0], unless the chain has
    forgotten x[0]. In a one-step method the increment then has f[i] and z[i] only.

    Args:
        states: the weight of each source in x[0] … x[N]; float64 [N+1, sources].

    Returns:
        a, [N], and the increments, [N, sources].
    """
    factors, increments = [], []
    for before, after in pairwise(states):
        largest = torch.maximum(before.abs().max(), after.abs().max())
        oldest = int((before.abs() > ROUNDING * before.abs().max()).nonzero()[0])
        factor = after[oldest] / before[oldest]
        increment = after - factor * before
        increments.append(increment.where(increment.abs() > ROUNDING * largest, 0))
        factors.append(factor)
    return torch.stack(factors), torch.stack(increments)


class _ExactMode(TorchFunctionMode):
    """Runs a scheduler's step in float64, on the noise that it is given.

    Schedulers draw their noise by `torch.randn`, and some round the latents to float32. One takes the square root of a
    variance that rounding can make slightly negative, if the chain starts from pure noise.
    """

    def __init__(self, noise: torch.Tensor):
        super().__init__()
        self.noise, self.has_drawn = noise, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.randn:
            self.has_drawn = True
            return self.noise
        if function is torch.Tensor.to and args[0].dtype == torch.float64:
            return args[0]
        if function is torch.Tensor.__pow__ and args[1] == 0.5:
            args = (args[0].clamp(min=0), 0.5)
        return function(*args, **kwargs)
