"""AlignProp: fine-tuning a text-to-image model by back-propagating a reward through its sampling chain.

Prabhudesai et al. 2023, arXiv 2310.03739. `AlignPropTrainer.step` is the method; the loop around it is loop.py.
"""

import torch
from tqdm.auto import tqdm

from alignprop.callbacks import check_given
from alignprop.engine.seeding import generator, generators, seed_global
from alignprop.loop import TrainingLoop, now
from alignprop.method import estimators
from alignprop.method.base_distance import base_conditioning, base_distance
from alignprop.method.estimators import ESTIMATORS, build_estimator
from alignprop.method.losses import LOSSES
from alignprop.method.plans import GradientPlan
from alignprop.models.base import Conditioning, select
from alignprop.prompts import draw_prompts
from alignprop.settings.errors import one_of
from alignprop.settings.memory_policies import chunks
from alignprop.settings.resolve import estimator_options


class AlignPropTrainer(TrainingLoop):
    """Trains a LoRA (or the whole denoiser) for a differentiable reward.

    Args:
        config: see config/align_prop.py.
        reward_function, prompt_function, model, image_samples_hook: used instead of what the configuration names; see
            TrainingLoop (loop.py).

    Raises:
        ConfigError, rewards.RewardError: one line for a mistake in the configuration.
    """

    def __init__(self, config, reward_function=None, prompt_function=None, model=None, image_samples_hook=None):
        check_given(config, model, image_samples_hook)
        one_of("estimator", config.estimator, [name for name in ESTIMATORS if name != "none"])
        super().__init__(config, reward_function, prompt_function, model, image_samples_hook, needs_gradient=True)
        self.estimator = build_estimator(config.estimator, **estimator_options(self.config))
        self.loss = LOSSES[config.loss]

    def step(self) -> dict:
        """One optimizer step over `total_batch_size` samples (Algorithm 1 of the paper); returns its metrics row."""
        c, run, started = self.config, self.run, now()
        key = (c.seed, self.global_step)
        seed_global(*key, "global", run.accelerator.process_index)
        plan = self.estimator(run.rollout.sampler, c.train.total_batch_size, generator(*key, "plan"))
        samples, progress = [], {"desc": f"step {self.global_step + 1}", "leave": False, "disable": not run.is_main}
        for indices in tqdm(self._micro_batches(), **progress):
            samples.append(self.add_gradients(key, indices, plan.select(indices)))
        losses, rewards, *others = run.accelerator.gather(torch.cat(samples, dim=1).T.contiguous()).T
        terms, distances = others[: len(run.reward.terms)], others[len(run.reward.terms) :]
        adjoint_norms = self._adjoint_norms()
        grad_norm = self.weights.update(losses)
        self.global_step += 1
        return self.row(
            rewards, terms, started,
            loss=losses.mean().item(),
            **({"base_distance": distances[0].mean().item()} if distances else {}),
            grad_norm=grad_norm,
            adjoint_norm=adjoint_norms,
            samples=self.global_step * c.train.total_batch_size,
            active_steps=plan.active.sum(0).double().mean().item(),
        )  # fmt: skip

    def add_gradients(self, key: tuple, indices: torch.Tensor, plan: GradientPlan) -> torch.Tensor:
        """Adds ∂(mean loss of the global batch)/∂θ of some of its samples to θ's `.grad`.

        Args:
            key: of the optimizer step's random numbers.
            indices: the samples, by their place in the global batch.
            plan: theirs.

        Returns:
            What `loss_gradient` says of each sample, and at last its base distance where `kl_coeff` is not 0.
        """
        c, model, rollout, enter = self.config, self.run.model, self.run.rollout, self.run.residency.enter
        prompts, metadata = draw_prompts(self.prompts, *key, indices)
        if not model.knows(prompts):
            enter("encode")
        cond = model.encode_prompts(prompts)
        if c.train_text_encoder:
            cond = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in cond.items()}
        enter("denoise")
        latents = rollout(generators(indices, *key, "noise"), cond, plan)
        copied = ([one for one in some for _ in range(1 + plan.copies)] for some in (prompts, metadata))
        enter("decode")
        noise = [generator(*key, "reward noise", int(j), n) for j in indices for n in range(1 + plan.copies)]
        adjoint, scores = self.loss_gradient(latents.detach(), *copied, noise)
        adjoint, scores = adjoint / (1 + plan.copies), scores.unflatten(1, (-1, 1 + plan.copies)).mean(dim=2)
        enter("denoise")
        latents.backward(adjoint)  # the sweep
        if c.kl_coeff:
            distances = self.add_base_distance(key, indices, prompts, cond, latents.detach()[:: 1 + plan.copies])
            scores = torch.cat([scores, distances[None]])
            scores[0] += c.kl_coeff * distances
        if c.train_text_encoder:
            enter("encode")
            model.backward_prompts(prompts, {n: t.grad for n, t in cond.items() if t.grad is not None})
        return scores

    def add_base_distance(
        self, key: tuple, indices, prompts: list[str], cond: Conditioning, latents: torch.Tensor
    ) -> torch.Tensor:
        """Adds ∂(kl_coeff · mean base distance of the global batch)/∂θ of some of its samples to θ's `.grad`.

        At one step of the chain for each, any with the same probability; θ gets this gradient, and `cond` its part.

        Args:
            prompts, cond: of B samples.
            latents: their final ones.

        Returns:
            The base distance of each (method/base_distance.py), [B].
        """
        c, run, streams = self.config, self.run, generators(indices, *key, "kl")
        if c.train_text_encoder:
            run.residency.enter("encode")
        base_cond = base_conditioning(run.model, prompts, cond)
        run.residency.enter("denoise")
        steps = torch.stack([torch.randint(run.rollout.sampler.num_steps, (), generator=g) for g in streams])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in streams])
        found = []
        for rows in chunks(len(latents), c.memory.sweep_chunk):
            chunk, base_chunk = select(cond, rows), select(base_cond, rows)
            distances = base_distance(run.rollout, latents[rows], chunk, steps[rows], noise[rows], base_chunk)
            run.accelerator.backward(c.kl_coeff * distances.sum() / c.train.total_batch_size)
            found.append(distances.detach())
        return torch.cat(found)

    def loss_gradient(self, latents: torch.Tensor, prompts: list[str], metadata: list[dict], noise=None):
        """λ = ∂loss/∂(final latents), through the VAE and the reward, some samples at a time.

        Args:
            latents: the final ones of B samples.
            noise: where `reward_noise` is not 0, B generators of that on the pictures, whose values may then leave
                [0, 1]: clamped, they would pass no gradient there.

        Returns:
            λ, and of each sample its loss, its reward and the reward's terms, [2 + terms, B].
        """
        c, run = self.config, self.run
        adjoint, scores = torch.empty_like(latents), []
        for rows in chunks(len(latents), c.memory.decode_chunk):
            chunk = latents[rows].requires_grad_()
            images = run.model.decode(chunk)
            if c.reward_noise:
                drawn = torch.stack([torch.randn(images.shape[1:], generator=g) for g in noise[rows]])
                images = images + c.reward_noise * drawn.to(images)
            terms = run.reward.score_terms(images, prompts[rows], metadata[rows])
            rewards = run.reward.combine(terms)
            losses = c.train.loss_coeff * c.grad_scale * self.loss(rewards, c.loss_target)
            run.accelerator.backward(losses.sum() / c.train.total_batch_size)
            adjoint[rows] = chunk.grad
            scores.append(torch.stack([losses, rewards, *terms.values()]).detach())
        return adjoint, torch.cat(scores, dim=1)

    def try_memory(self) -> None:
        size = self.config.per_gpu_capacity
        plan = estimators.full(self.run.rollout.sampler, size)
        self.add_gradients((self.config.seed, "trial"), torch.arange(size), plan)

    def _adjoint_norms(self) -> list[float | None]:
        """Mean over samples of ‖∂(sample's loss)/∂x[i]‖, i = 0 … N; None where no gradient needed it."""
        c, accelerator = self.config, self.run.accelerator
        totals = accelerator.reduce(self.run.rollout.adjoint_norms.take().float().to(accelerator.device), "sum").cpu()
        # Undo the mean over the global batch and the loss scale.
        factor = c.train.total_batch_size / (accelerator.scaler.get_scale() if accelerator.scaler else 1.0)
        return [float(f"{s / n * factor:.4g}") if n else None for s, n in totals.T.tolist()]
