"""Reward guidance: a higher reward from the same weights, by moving the latents during sampling.

Each step i in a window of the chain predicts the clean latents, and takes the gradient of their reward:

    x̂0 = p[i]·x[i] + q[i]·f[i]                   R = reward(decode(x̂0))        g = ∂R/∂x[i]

It then moves the sampler's next latents along g, each sample separately:

    x[i+1] ← x[i+1] + η[i] · ‖x[i+1] - x[i]‖ · g/‖g‖

If g is differentiated through the denoiser, it is the gradient that DPS (Chung et al. 2023, arXiv 2209.14687),
Universal Guidance (Bansal et al. 2023, arXiv 2302.07121) and FreeDoM (Yu et al. 2023, arXiv 2303.09833) follow. If f is
treated as a constant, g has the direction of ∂R/∂x̂0, as in MPGD (He et al. 2024, arXiv 2311.16424), and only the
decoder and the reward are differentiated.

Only the direction of g counts, as in DSG (Yang et al. 2024, arXiv 2402.03201), so the units of the reward do not
matter. The length of the move is a share of the sampler's step, so the number of steps does not matter either.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from alignprop.engine.activations import decode_activations_on
from alignprop.method.chain import Past, Sampler, per_sample
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, Phases, select
from alignprop.settings.memory_policies import chunks
from rewards import RewardError, WeightedReward


class RewardGuidance:
    """Maps noise and conditioning to final latents, like a rollout without a plan, but with reward guidance.

    Args:
        rollout: gives the chain, the network calls and the memory policy.
        reward: a differentiable reward.
        strength: see `strengths`.
        through: "denoiser" differentiates the reward through the denoiser. "x0" treats f as a constant.
        schedule: see `strengths`.
        window: see `strengths`.
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
        """Returns x[N], float32 [B, ...].

        Args:
            generators: one for each sample, as in `Rollout.forward`.
            cond: the conditioning of the B samples.
            prompts: the prompts of the samples, for the reward.
            metadata: the metadata of the samples, for the reward.

        Raises:
            rewards.RewardError: the reward's gradient is not finite.
        """
        latents = [
            self._sample(generators[rows], select(cond, rows), prompts[rows], metadata[rows])
            for rows in chunks(len(generators), self.rollout.memory.sweep_chunk)
        ]
        return torch.cat(latents)

    def _sample(self, generators, cond, prompts, metadata):
        latents, past = self.rollout.start(generators), Past(self.rollout.sampler, generators)
        for i, strength in enumerate(self.strengths.tolist()):
            if strength:
                model_output, direction = self.look_ahead(i, latents, cond, prompts, metadata)
            else:
                with self.phases("denoise"):
                    model_output = self.rollout.f(*self.rollout.inputs(i, latents), cond)
            following = self.rollout.next_latents(i, latents, model_output, past)
            if strength:
                length = _rms(following - latents)  # `direction` has a root mean square of 1
                following = following + strength * length * direction
            latents = following
        return latents

    @torch.no_grad()
    def look_ahead(self, i: int, latents, cond, prompts, metadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns f at x[i] and the direction of g, both [B, ...].

        The direction has a root mean square of 1 in each sample. It is zero for a sample with a gradient of zero.

        Raises:
            rewards.RewardError: the reward's gradient is not finite.
        """
        f, sampler = self.rollout.f, self.rollout.sampler
        p, q, scale = (float(c[i]) for c in (sampler.p, sampler.q, sampler.scale))
        seen, t = self.rollout.inputs(i, latents)
        through_denoiser, graph = self.through == "denoiser", None
        with self.phases("denoise"):
            if through_denoiser and self.rollout.memory.residency == "all":
                model_output, graph = f.with_graph(seen, t, cond, needs_input=True)
            else:  # No graph is kept, because it holds the weights, and these may leave the device.
                model_output = f(seen, t, cond)
        direction = self._into_clean(p * latents + q * model_output, prompts, metadata)
        if through_denoiser:
            with self.phases("sweep"):
                if graph:
                    products = f.products_of(graph, q * direction, [])
                else:
                    products = f.products_at(seen.detach().requires_grad_(), t, cond, q * direction, [])
            direction = self._unit(p * direction + scale * products.latents)
        return model_output, direction

    def _into_clean(self, predicted: torch.Tensor, prompts, metadata) -> torch.Tensor:
        """Returns the direction of ∂R/∂x̂0, with a root mean square of 1 in each sample."""
        gradients = []
        for rows in chunks(len(predicted), self.rollout.memory.decode_chunk):
            with self.phases("decode"), torch.enable_grad():
                latents = predicted[rows].detach().requires_grad_()
                with decode_activations_on(self.rollout.memory.decode_activations, latents.device):
                    images = self.rollout.model.decode(latents)
                    pictures = images.detach().requires_grad_()
                    total = self.reward(pictures, prompts[rows], metadata[rows]).sum()
                # The gradient is scaled to unit size here, because a decoder in half precision loses a small gradient.
                into_pictures = self._unit(torch.autograd.grad(total, pictures)[0])
                gradients += torch.autograd.grad(images, latents, into_pictures)
        return self._unit(torch.cat(gradients))

    def _unit(self, gradient: torch.Tensor) -> torch.Tensor:
        largest = gradient.flatten(1).abs().amax(dim=1)
        if not largest.isfinite().all():
            raise RewardError(f"reward {self.reward.name!r} has no finite gradient to follow: {largest.tolist()}")
        # The largest entry is divided out first, because the squares of small entries underflow.
        scaled = gradient / per_sample(largest.where(largest > 0, 1), gradient)
        size = _rms(scaled)
        return scaled / size.where(size > 0, 1)


def strengths(sampler: Sampler, strength: float, schedule: str, window: Sequence[float]) -> torch.Tensor:
    """Returns η of each step, float64 [N]; 0 outside the window.

    Args:
        sampler: the chain.
        strength: the mean of η over the steps in the window.
        schedule: how η depends on the step in the window. With "constant" it does not. With "noise" it is proportional
            to σ/(α+σ), the share of noise, in x[i]. With "late" it is proportional to α/(α+σ) in x[i+1].
        window: (from, to), as shares of the chain. Step i is in the window if from <= (i + 0.5)/N < to.

    Raises:
        ConfigError: no step is in the window.
    """
    inside = sampler.inside(window, "guide.window")
    noise = sampler.sigma / (sampler.alpha + sampler.sigma)
    shape = {"constant": torch.ones_like(noise[1:]), "noise": noise[:-1], "late": 1 - noise[1:]}[schedule] * inside
    return strength * shape / (shape.sum() / inside.sum())


def _rms(values: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of each sample, shaped to multiply `values`."""
    return per_sample(values.flatten(1).square().mean(dim=1).sqrt(), values)
