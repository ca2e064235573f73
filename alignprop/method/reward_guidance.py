"""Reward guidance: a higher reward from the same weights, by moving the latents on their way.

A step i of the window looks ahead to the clean latents that it predicts, and to their reward:

    x̂0 = p[i]·x[i] + q[i]·f(x[i], t[i], c)        R = reward(decode(x̂0))        g = ∂R/∂x[i]

and what the sampler comes to is moved along g, each sample by itself:

    x[i+1] ← x[i+1] + η[i] · ‖x[i+1] - x[i]‖ · g/‖g‖

Through the denoiser, g is what DPS (Chung et al. 2023, arXiv 2209.14687), Universal Guidance (Bansal et al. 2023,
arXiv 2302.07121) and FreeDoM (Yu et al. 2023, arXiv 2303.09833) follow. With f for a constant it has the direction of
∂R/∂x̂0, as in MPGD (He et al. 2024, arXiv 2311.16424), and no network is differentiated but decoder and reward. The
direction alone counts, as in DSG (Yang et al. 2024, arXiv 2402.03201), so that the units of a reward do not matter; and
the length is a share of the sampler's own step, so that neither does the number of steps.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from alignprop.method.rollout import Rollout
from alignprop.method.samplers import Sampler
from alignprop.models.base import Conditioning, Phases, select
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import chunks
from rewards import RewardError, WeightedReward


class RewardGuidance:
    """Noise and conditioning in, final latents out, as of a rollout without a plan.

    Args:
        rollout: its chain, its network calls and its memory policy are used.
        reward: a differentiable one.
        strength, schedule, window: see `strengths`.
        through: "denoiser" or "x0".
        phases: brings the modules of a phase to the device (memory/residency.py).

    Raises:
        ConfigError: no step is in the window.
    """

    def __init__(
        self, rollout: Rollout, reward: WeightedReward, *, strength: float, through: str, schedule: str,
        window: Sequence[float], phases: Phases = nullcontext,
    ):  # fmt: skip
        self.rollout, self.reward, self.through, self.phases = rollout, reward, through, phases
        self.strengths = strengths(rollout.sampler, strength, schedule, window)

    @torch.no_grad()
    def __call__(self, generators: list[torch.Generator], cond: Conditioning, prompts, metadata) -> torch.Tensor:
        """x[N], float32 [B, ...].

        Args:
            generators: one per sample, as of `Rollout.forward`.
            cond, prompts, metadata: of the B samples.

        Raises:
            rewards.RewardError: the reward's gradient is not finite.
        """
        latents = [
            self._sample(generators[rows], select(cond, rows), prompts[rows], metadata[rows])
            for rows in chunks(len(generators), self.rollout.memory.sweep_chunk)
        ]
        return torch.cat(latents)

    def _sample(self, generators, cond, prompts, metadata):
        latents = self.rollout.model.init_latents(generators)
        for i, strength in enumerate(self.strengths.tolist()):
            if strength:
                model_output, direction = self.look_ahead(i, latents, cond, prompts, metadata)
            else:
                with self.phases("denoise"):
                    model_output = self.rollout.f(latents, self._timestep(i, latents), cond)
            following = self.rollout.next_latents(i, latents, model_output, generators)
            if strength:
                length = _rms(following - latents)  # that of `direction` is 1
                following = following + strength * length * direction
            latents = following
        return latents

    @torch.no_grad()
    def look_ahead(self, i: int, latents, cond, prompts, metadata) -> tuple[torch.Tensor, torch.Tensor]:
        """f at x[i], and g with a root mean square of 1 in each sample, zero where the reward is flat; [B, ...] both.

        Raises:
            rewards.RewardError: the reward's gradient is not finite.
        """
        f, t = self.rollout.f, self._timestep(i, latents)
        p, q = (float(c[i]) for c in (self.rollout.sampler.p, self.rollout.sampler.q))
        through_denoiser, graph = self.through == "denoiser", None
        with self.phases("denoise"):
            if through_denoiser and self.rollout.memory.residency == "all":
                model_output, graph = f.with_graph(latents, t, cond, needs_input=True)
            else:  # a graph would hold the weights, which may leave the device
                model_output = f(latents, t, cond)
        direction = self._into_clean(p * latents + q * model_output, prompts, metadata)
        if through_denoiser:
            with self.phases("sweep"):
                if graph:
                    products = f.products_of(graph, q * direction, [])
                else:
                    products = f.products_at(latents.detach().requires_grad_(), t, cond, q * direction, [])
            direction = self._unit(p * direction + products.latents)
        return model_output, direction

    def _into_clean(self, predicted: torch.Tensor, prompts, metadata) -> torch.Tensor:
        """The direction of ∂R/∂x̂0."""
        gradients = []
        for rows in chunks(len(predicted), self.rollout.memory.decode_chunk):
            with self.phases("decode"), torch.enable_grad():
                latents = predicted[rows].detach().requires_grad_()
                images = self.rollout.model.decode(latents)
                pictures = images.detach().requires_grad_()
                total = self.reward(pictures, prompts[rows], metadata[rows]).sum()
                # Brought to unit size on the way, since a decoder of half precision would lose a small gradient.
                into_pictures = self._unit(torch.autograd.grad(total, pictures)[0])
                gradients += torch.autograd.grad(images, latents, into_pictures)
        return self._unit(torch.cat(gradients))

    def _unit(self, gradient: torch.Tensor) -> torch.Tensor:
        largest = gradient.flatten(1).abs().amax(dim=1)
        if not largest.isfinite().all():
            raise RewardError(f"reward {self.reward.name!r} has no finite gradient to follow: {largest.tolist()}")
        # First by the largest entry, since squares underflow.
        scaled = gradient / _per_sample(largest.where(largest > 0, 1), gradient)
        size = _rms(scaled)
        return scaled / size.where(size > 0, 1)

    def _timestep(self, i: int, latents: torch.Tensor) -> torch.Tensor:
        return self.rollout.sampler.timesteps[i].to(latents.device)


def strengths(sampler: Sampler, strength: float, schedule: str, window: Sequence[float]) -> torch.Tensor:
    """η of each step, float64 [N]; 0 outside the window.

    Args:
        strength: the mean of η over the window.
        schedule: "constant"; "noise": η is proportional to the share of noise σ/(α+σ) in x[i]; "late": to the rest,
            in x[i+1].
        window: (from, to), shares of the chain; a step counts where its middle does.

    Raises:
        ConfigError: no step is in the window.
    """
    middle = (torch.arange(sampler.num_steps) + 0.5) / sampler.num_steps
    inside = (window[0] <= middle) & (middle < window[1])
    if not inside.any():
        raise ConfigError(
            f"guide.window = {tuple(window)} has none of the {sampler.num_steps} sampler steps in it; step i is at "
            f"(i + 0.5) / {sampler.num_steps}"
        )
    noise = sampler.sigma / (sampler.alpha + sampler.sigma)
    shape = {"constant": torch.ones_like(noise[1:]), "noise": noise[:-1], "late": 1 - noise[1:]}[schedule] * inside
    return strength * shape / (shape.sum() / inside.sum())


class Timed:
    """`sample(generators, …)`, and how long its calls took.

    Attributes:
        seconds_per_picture: the mean over all calls so far.
    """

    def __init__(self, sample: Callable[..., torch.Tensor], device: torch.device):
        self.sample, self.device, self.seconds, self.pictures = sample, device, 0.0, 0

    def __call__(self, generators, *args) -> torch.Tensor:
        start = time.perf_counter()
        latents = self.sample(generators, *args)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds, self.pictures = self.seconds + time.perf_counter() - start, self.pictures + len(generators)
        return latents

    @property
    def seconds_per_picture(self) -> float:
        return self.seconds / max(self.pictures, 1)


def _rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each sample, shaped to multiply it."""
    return _per_sample(values.flatten(1).square().mean(dim=1).sqrt(), values)


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
