"""The gradient of the mean loss for some samples: the inside of the loop of Algorithm 1 (arXiv 2310.03739).

cond   = encode(prompts)                                        phase "encode"
x[N]   = the rollout of x[0], z, cond                           phase "denoise", without gradient
λ      = ∂loss/∂x[N], through decoder and reward                phase "decode"
∂/∂θ  += the sweep of λ down the chain                          phase "sweep"
∂/∂θ  += kl_coeff · ∂(base distance)/∂θ                         phase "compare", if kl_coeff is not 0
∂/∂θ  += ∂loss/∂cond through the text encoders                  phase "encode", if they are trained
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from alignprop.engine.activations import decode_activations_on
from alignprop.engine.seeding import generator, generators
from alignprop.method.base_distance import base_conditioning, base_distance
from alignprop.method.losses import LOSSES
from alignprop.method.plans import GradientPlan
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, Model, Phases, encode, select
from alignprop.settings.memory_policies import chunks
from rewards import WeightedReward


class SampleValues(NamedTuple):
    """The measured values of B samples, after their gradient was added. Each tensor is float32 [B].

    Attributes:
        losses: the loss that was minimised. It contains `kl_coeff` times the base distance.
        rewards: the reward that the loss is computed from.
        terms: the scores of each term of the reward, before they are weighted, by the name of the term.
        base_distances: the distance of the denoiser's output from the base model's; zeros if `kl_coeff` is 0.
    """

    losses: torch.Tensor
    rewards: torch.Tensor
    terms: dict[str, torch.Tensor]
    base_distances: torch.Tensor

    @classmethod
    def join(cls, parts: list["SampleValues"]) -> "SampleValues":
        """Concatenates the values of several groups of samples."""
        terms = {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms}
        losses, rewards, distances = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("losses", "rewards", "base_distances")
        )
        return cls(losses, rewards, terms, distances)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "SampleValues":
        """Applies `function` to each tensor."""
        terms = {name: function(scores) for name, scores in self.terms.items()}
        return SampleValues(function(self.losses), function(self.rewards), terms, function(self.base_distances))


@dataclass(frozen=True)
class RewardGradient:
    """Adds some samples' share of ∂(mean loss of the global batch)/∂θ to the `.grad` of the trained parameters.

    Args:
        model: encodes the prompts and decodes the latents.
        rollout: the sampling chain. Its memory policy says how many samples are decoded at once.
        reward: scores the pictures.
        phases: brings the modules of a phase to the device.
        backward: runs the backward pass of a loss. It may scale the loss first, as mixed precision requires.
        batch_size: the number of samples in the global batch, over which the loss is averaged.
        loss: a key of LOSSES.
        loss_target: the target or ceiling of the loss, in units of the reward.
        loss_factor: multiplies the loss.
        reward_noise: the standard deviation of the Gaussian noise that is added to the pictures before the reward
            sees them. Pictures are in [0, 1].
        kl_coeff: multiplies the base distance (base_distance.py), which is added to the loss. 0 adds no such term.
        trains_text_encoder: whether the gradient continues into the text encoders.
    """

    model: Model
    rollout: Rollout
    reward: WeightedReward
    phases: Phases
    backward: Callable[[torch.Tensor], None]
    batch_size: int
    loss: str = "maximise"
    loss_target: float | None = None
    loss_factor: float = 1.0
    reward_noise: float = 0.0
    kl_coeff: float = 0.0
    trains_text_encoder: bool = False

    def __call__(
        self, key: tuple, indices: torch.Tensor, prompts: list[str], metadata: list[dict], plan: GradientPlan
    ) -> SampleValues:
        """Adds the gradient of B samples.

        Args:
            key: the key of the random numbers of this optimizer step.
            indices: the positions of the samples in the global batch, int [B].
            prompts: the prompts of the samples.
            metadata: the metadata of the samples, for the reward.
            plan: which part of each sample's chain carries gradient.
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
        """Returns λ = ∂(mean loss of the global batch)/∂x[N], and the values of the B samples.

        λ has one row for each sample and each copy, like `latents`.

        Args:
            latents: the final latents, [B·(1 + copies), ...].
        """
        prompts, metadata, copies = plan.repeat(prompts), plan.repeat(metadata), 1 + plan.copies
        noises = [generator(*key, "reward noise", int(j), n) for j in indices for n in range(copies)]
        adjoints, values = [], []
        for rows in chunks(len(latents), self.rollout.memory.decode_chunk):
            adjoint, chunk_values = self._adjoint(latents[rows], prompts[rows], metadata[rows], noises[rows])
            adjoints.append(adjoint)
            values.append(chunk_values)
        # A sample's loss is the mean of the losses of the sample and its copies.
        return torch.cat(adjoints) / copies, SampleValues.join(values).apply(plan.average)

    def _adjoint(self, latents, prompts, metadata, noises) -> tuple[torch.Tensor, SampleValues]:
        """Returns λ and the values of rows that are decoded together; each copy counts as a sample here."""
        latents = latents.detach().requires_grad_()
        with decode_activations_on(self.rollout.memory.decode_activations, latents.device):
            images = self._with_noise(self.model.decode(latents), noises)
            terms = self.reward.score_terms(images, prompts, metadata)
        rewards = self.reward.combine(terms)
        losses = self.loss_factor * LOSSES[self.loss](rewards, self.loss_target)
        self.backward(losses.sum() / self.batch_size)
        terms = {name: scores.detach() for name, scores in terms.items()}
        return latents.grad, SampleValues(losses.detach(), rewards.detach(), terms, torch.zeros_like(losses.detach()))

    def _with_noise(self, images: torch.Tensor, noises: list[torch.Generator]) -> torch.Tensor:
        """Adds the reward noise to pictures [b, 3, H, W].

        The result may leave [0, 1]. It is not clamped, because clamped pixels pass no gradient.
        """
        if not self.reward_noise:
            return images
        noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in noises])
        return images + self.reward_noise * noise.to(images)

    def add_base_distance(self, key, indices, prompts, cond: Conditioning, latents: torch.Tensor) -> torch.Tensor:
        """Adds the share of B samples in ∂(kl_coeff · mean base distance of the global batch)/∂θ to `.grad`.

        If tensors of `cond` require a gradient, their share is added to their `.grad` too. Each sample is compared with
        the base model at one step of the chain, which is drawn uniformly.

        Args:
            cond: the conditioning of the prompts.
            latents: the final latents of the samples, [B, ...].

        Returns:
            The base distance of each sample, [B].
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
