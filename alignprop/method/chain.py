"""The sampling chain as numbers: N steps, each of them one network call and a linear map.

    x[i+1] = a[i]·x[i] + Σ_{m≤i} b[i,m]·f[m] + Σ_{k≤i} s[i,k]·z[k]          i = 0 … N-1
    f[i]   = f(scale[i]·x[i], t[i], c)
    x̂0[i]  = p[i]·x[i] + q[i]·f[i]                                the clean latents that step i predicts

`f` is the denoiser's output after guidance, and `z` is standard normal noise. Every usual scheduler of diffusers has
this form. In a one-step method, such as DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12) or Euler's, b and s are
diagonal. A multistep method, such as DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), uses earlier outputs again. A
method of second order, such as Heun's, makes two calls for one of its own steps, and each of them is a step here.

The coefficients need no formulas, because a run of the scheduler on unit tensors gives them (samplers.py, tables.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from alignprop.settings.errors import ConfigError


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
        p: float64; the weight of the latents in x̂0. It may be None in a chain without x̂0, and so may the next three.
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
        return max(sum(map(len, self.still_needed(i))) for i in range(self.num_steps))

    def coefficients(self, i: int, exit_step: torch.Tensor | None, like: torch.Tensor) -> tuple:
        """Returns a[i], and the weights of the outputs and of the noises in step i that are not zero, by their index.

        They are those of the chain for samples in it; p, q and no noise for samples that leave it at step i; and 1 and
        nothing else for samples that left it earlier.

        Args:
            exit_step: the step at which each sample leaves the chain, int [B]; None if they all stay to its end.
            like: the latents [B, ...] that the results multiply. With `exit_step` each result is a tensor [B, 1, …].
        """
        b, s = ({m: float(row[m]) for m in row.nonzero().flatten().tolist()} for row in (self.b[i], self.s[i]))
        if exit_step is None:
            return float(self.a[i]), b, s
        p, q = float(self.p[i]), float(self.q[i])

        def of_samples(in_chain: float, leaving: float = 0.0, left: float = 0.0) -> torch.Tensor:
            values = torch.tensor([left, leaving, in_chain], dtype=torch.float64)
            return per_sample(values[1 + (exit_step - i).sign()].to(like), like)

        outputs = {m: of_samples(b.get(m, 0.0), q if m == i else 0.0) for m in {**b, i: q}}
        return of_samples(float(self.a[i]), p, 1.0), outputs, {k: of_samples(weight) for k, weight in s.items()}

    def within(self, interval: Sequence[float]) -> Callable[[torch.Tensor], bool] | None:
        """Returns a function that says whether a timestep is in a part of the chain, or None if the part is the whole.

        If two steps of a method of second order have one timestep, both are in the part as soon as one is.

        Raises:
            ConfigError: no step is in `guidance_interval`, which is (from, to) as `inside` explains it.
        """
        if tuple(interval) == (0, 1):
            return None
        timesteps = set(self.timesteps[self.inside(interval, "guidance_interval")].tolist())
        return lambda timestep: timestep.item() in timesteps

    def inside(self, interval: Sequence[float], field: str) -> torch.Tensor:
        """Returns which steps are in a part of the chain, bool [N].

        Args:
            interval: (from, to), in shares of the chain. Step i is in the part if from <= (i + 0.5)/N < to.
            field: the name of the field that says it, for the message.

        Raises:
            ConfigError: no step is in the part.
        """
        middle = (torch.arange(self.num_steps) + 0.5) / self.num_steps
        inside = (interval[0] <= middle) & (middle < interval[1])
        if not inside.any():
            raise ConfigError(
                f"{field} = {tuple(interval)} has none of the {self.num_steps} sampler steps in it; step i is at "
                f"(i + 0.5) / {self.num_steps}"
            )
        return inside

    def still_needed(self, i: int) -> tuple[set[int], set[int]]:
        """Returns the indices of those outputs, and of those noises, up to step i that steps after step i use."""
        later = (table[i + 1 :, : i + 1].any(dim=0) for table in (self.b, self.s))
        outputs, noises = (set(used.nonzero().flatten().tolist()) for used in later)
        return outputs, noises


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns one number of each sample, [B], shaped to multiply latents [B, ...] like `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


class Past:
    """The outputs f[m] and noises z[k] of earlier steps that later steps of a chain still use, by their index.

    Args:
        sampler: the chain.
        generators: one for each sample; each draws its sample's noise.
    """

    def __init__(self, sampler: Sampler, generators: list[torch.Generator]):
        self.sampler, self.generators = sampler, generators
        self.outputs: dict[int, torch.Tensor] = {}
        self.noises: dict[int, torch.Tensor] = {}

    def add(self, i: int, model_output: torch.Tensor) -> None:
        """Keeps f[i], and draws z[i] if the sampler draws noise in step i."""
        self.outputs[i] = model_output
        if self.sampler.draws[i]:
            noise = torch.stack([torch.randn(model_output.shape[1:], generator=g) for g in self.generators])
            self.noises[i] = noise.to(model_output)

    def forget(self, i: int) -> None:
        """Drops what no step after step i uses."""
        outputs, noises = self.sampler.still_needed(i)
        self.outputs = {m: output for m, output in self.outputs.items() if m in outputs}
        self.noises = {k: noise for k, noise in self.noises.items() if k in noises}
