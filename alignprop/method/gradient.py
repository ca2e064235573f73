"""The gradient of the mean reward, for some samples: what is inside the loop of Algorithm 1 (arXiv 2310.03739).

cond   = encode(prompts)                                        phase "encode"
x[N]   = the rollout of x[0], z, cond                           phase "denoise", without gradient
λ      = ∂loss/∂x[N], through decoder and reward                phase "decode"
∂/∂θ  += the sweep of λ down the chain                          phase "sweep"
∂/∂θ  += kl_coeff · ∂(base distance)/∂θ                         phase "compare", where kl_coeff is not 0
∂/∂θ  += ∂loss/∂cond through the text encoders                  phase "encode", where they are trained
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from alignprop.engine.seeding import generator, generators
from alignprop.method.base_distance import base_conditioning, base_distance
from alignprop.method.losses import LOSSES
from alignprop.method.plans import GradientPlan
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, Model, Phases, encode, select
from alignprop.settings.memory_policies import chunks
from rewards import WeightedReward


class SampleValues(NamedTuple):
    """What is known of each of B samples after its gradient was added; float32 [B] each.

    Attributes:
        losses: what was minimised, with the samples' base distances where `kl_coeff` is not 0.
        rewards: the reward that the loss is made of.
        terms: the scores of each single reward, before its weight, by its name.
        base_distances: how far the denoiser's outputs are from the base model's; zeros where `kl_coeff` is 0.
    """

    losses: torch.Tensor
    rewards: torch.Tensor
    terms: dict[str, torch.Tensor]
    base_distances: torch.Tensor

    @classmethod
    def join(cls, parts: list["SampleValues"]) -> "SampleValues":
        """The values of several groups of samples, one after the other."""
        terms = {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms}
        losses, rewards, distances = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("losses", "rewards", "base_distances")
        )
        return cls(losses, rewards, terms, distances)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "SampleValues":
        """`function` of each tensor."""
        terms = {name: function(scores) for name, scores in self.terms.items()}
        return SampleValues(function(self.losses), function(self.rewards), terms, function(self.base_distances))


@dataclass(frozen=True)
class RewardGradient:
    """Adds ∂(mean loss of the global batch)/∂θ of some of its samples to the `.grad` of what is trained.

    Args:
        model: whose prompts are encoded and whose latents are decoded.
        rollout: the sampling chain; its memory policy says how many samples are decoded at once.
        reward: scores the pictures.
        phases: brings the modules of a phase to the device.
        backward: of a loss; it may scale it, as mixed precision needs.
        batch_size: samples of the global batch, over which the loss is averaged.
        loss: a key of LOSSES. loss_target: in units of the reward. loss_scale: multiplies the loss.
        reward_noise: standard deviation of Gaussian noise on the pictures that the reward sees, in units of [0, 1].
        kl_coeff: multiplies the base distance (base_distance.py), which is added to the loss; 0: no such term.
        trains_text_encoder: gradient flows on into the text encoders.
    """

    model: Model
    rollout: Rollout
    reward: WeightedReward
    phases: Phases
    backward: Callable[[torch.Tensor], None]
    batch_size: int
    loss: str = "maximise"
    loss_target: float | None = None
    loss_scale: float = 1.0
    reward_noise: float = 0.0
    kl_coeff: float = 0.0
    trains_text_encoder: bool = False

    def __call__(
        self, key: tuple, indices: torch.Tensor, prompts: list[str], metadata: list[dict], plan: GradientPlan
    ) -> SampleValues:
        """Adds the gradient of B samples.

        Args:
            key: of the optimizer step's random numbers.
            indices: the samples' places in the global batch, int [B].
            prompts, metadata: theirs.
            plan: which part of their chains carries gradient.
        """
        cond = encode(self.model, prompts, self.phases)
        if self.trains_text_encoder:
            cond = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in cond.items()}
        with self.phases("denoise"):
            latents = self.rollout(generators(indices, *key, "noise"), cond, plan)
        with self.phases("decode"):
            adjoint, values = self.adjoint(key, indices, latents.detach(), prompts, metadata, plan)
        with self.phases("sweep"):
            latents.backward(adjoint)
        if self.kl_coeff:
            finals = latents.detach()[:: 1 + plan.copies]
            distances = self.add_base_distance(key, indices, prompts, cond, finals)
            values = values._replace(losses=values.losses + self.kl_coeff * distances, base_distances=distances)
        if self.trains_text_encoder:
            with self.phases("encode"):
                self.model.backward_prompts(prompts, {n: t.grad for n, t in cond.items() if t.grad is not None})
        return values

    def adjoint(self, key, indices, latents, prompts, metadata, plan) -> tuple[torch.Tensor, SampleValues]:
        """λ = ∂(mean loss of the global batch)/∂x[N] of the samples and their copies, and the samples' values.

        Args:
            latents: the final ones, [B·(1 + copies), ...].
        """
        prompts, metadata, copies = plan.repeat(prompts), plan.repeat(metadata), 1 + plan.copies
        noises = [generator(*key, "reward noise", int(j), n) for j in indices for n in range(copies)]
        adjoints, values = [], []
        for rows in chunks(len(latents), self.rollout.memory.decode_chunk):
            adjoint, chunk_values = self._adjoint(latents[rows], prompts[rows], metadata[rows], noises[rows])
            adjoints.append(adjoint)
            values.append(chunk_values)
        # The loss of a sample is the mean over itself and its copies.
        return torch.cat(adjoints) / copies, SampleValues.join(values).apply(plan.average)

    def _adjoint(self, latents, prompts, metadata, noises) -> tuple[torch.Tensor, SampleValues]:
        """The same of samples that are decoded together."""
        latents = latents.detach().requires_grad_()
        images = self._with_noise(self.model.decode(latents), noises)
        terms = self.reward.score_terms(images, prompts, metadata)
        rewards = self.reward.combine(terms)
        losses = self.loss_scale * LOSSES[self.loss](rewards, self.loss_target)
        self.backward(losses.sum() / self.batch_size)
        terms = {name: scores.detach() for name, scores in terms.items()}
        return latents.grad, SampleValues(losses.detach(), rewards.detach(), terms, torch.zeros_like(losses.detach()))

    def _with_noise(self, images: torch.Tensor, noises: list[torch.Generator]) -> torch.Tensor:
        """Pictures [b, 3, H, W] that may leave [0, 1]: clamped, they would pass no gradient there."""
        if not self.reward_noise:
            return images
        noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in noises])
        return images + self.reward_noise * noise.to(images)

    def add_base_distance(self, key, indices, prompts, cond: Conditioning, latents: torch.Tensor) -> torch.Tensor:
        """Adds ∂(kl_coeff · mean base distance of the global batch)/∂θ of B samples, and its part to `cond`.

        Each sample is compared at one step of the chain, any with the same probability.

        Args:
            cond: the conditioning of the prompts.
            latents: the samples' final ones, [B, ...].

        Returns:
            The base distance of each, [B].
        """
        streams, sampler = generators(indices, *key, "kl"), self.rollout.sampler
        base_cond = base_conditioning(self.model, prompts, cond, self.phases)
        steps = torch.stack([torch.randint(sampler.num_steps, (), generator=g) for g in streams])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in streams])
        distances = []
        with self.phases("compare"):
            for rows in chunks(len(latents), self.rollout.memory.sweep_chunk):
                chunk, base_chunk = select(cond, rows), select(base_cond, rows)
                distance = base_distance(self.rollout, latents[rows], chunk, steps[rows], noise[rows], base_chunk)
                self.backward(self.kl_coeff * distance.sum() / self.batch_size)
                distances.append(distance.detach())
        return torch.cat(distances)
