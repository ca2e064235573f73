"""AlignProp: fine-tuning a text-to-image model by back-propagating a reward through its sampling chain.

The method is from Prabhudesai et al. 2023, arXiv 2310.03739. `AlignPropTrainer.step` is one iteration of Algorithm 1:

1. Draw a plan. It says, for each sample of the batch, which sampling steps carry gradient.
2. For each micro-batch, draw prompts, sample images, compute the loss from their rewards, and add its gradient to
   `.grad` (method/gradient.py).
3. Update the trained weights.

The loop around the steps is in loop.py.
"""

from functools import cached_property
from typing import Any

import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.engine.seeding import generator, seed_global
from alignprop.loop import TrainingLoop, now
from alignprop.method.estimators import ESTIMATORS, Estimator, build_estimator
from alignprop.method.gradient import RewardGradient, SampleValues
from alignprop.method.plans import GradientPlan
from alignprop.method.prefix_cache import FULL_CALLS
from alignprop.method.rollout import Rollout
from alignprop.prompts import draw_prompts
from alignprop.settings.errors import ConfigError, one_of
from alignprop.settings.options import estimator_options, gradient_options

TRIED = 500  # samples whose plans are drawn for a trial step, which takes the plans with the most active steps


class AlignPropTrainer(TrainingLoop):
    """Trains a LoRA, or the whole denoiser, by back-propagating a differentiable reward.

    TrainingLoop (loop.py) explains the arguments of the constructor.
    """

    needs_gradient = True

    def check_config(self, config: ConfigDict) -> None:
        one_of("estimator", config.estimator, ESTIMATORS)

    def check_run(self) -> None:
        c, rollout = self.config, self.run.rollout
        plan = self.plan(rollout, (c.seed, 0))  # refuses an estimator that does not fit the sampler
        if rollout.prefix_cache and plan.steps_before_gradient <= FULL_CALLS:
            raise ConfigError(
                f"train.prefix_cache = {c.train.prefix_cache} must be 1 here: {plan.steps_before_gradient} of the "
                f"{rollout.sampler.num_steps} network calls of the first batch come before the first one with "
                f"gradient, and the first {FULL_CALLS} are always computed in full"
            )

    @cached_property
    def estimator(self) -> Estimator:
        return build_estimator(self.config.estimator, **estimator_options(self.config))

    def plan(self, rollout: Rollout, key: tuple[int, int | str]) -> GradientPlan:
        """Draws the plan of a step for the whole batch, so that it depends on neither micro-batches nor processes."""
        return self.estimator(rollout.sampler, self.config.train.total_batch_size, generator(*key, "plan"))

    def step(self) -> dict[str, Any]:
        """Makes one optimizer step over `total_batch_size` samples (Algorithm 1), and returns its metrics row."""
        run, started = self.run, now()
        key = (self.config.seed, self.global_step)
        rollout = self.rollout(key)
        seed_global(*key, "global", run.accelerator.process_index)

        plan = self.plan(rollout, key)
        progress = {"desc": f"step {self.global_step + 1}", "leave": False, "disable": not run.is_main}
        micro_batches = tqdm(self.micro_batches(), **progress)
        values = [self.add_gradients(key, indices, plan.select(indices)) for indices in micro_batches]
        values = run.accelerator.gather(SampleValues.join(values))
        adjoint_norms = self._adjoint_norms(rollout)
        grad_norm = self.weights.update(values.losses)

        self.global_step += 1
        return self.row(
            values.rewards, values.terms, started,
            loss=values.losses.mean().item(),
            **({"base_distance": values.base_distances.mean().item()} if self.config.kl_coeff else {}),
            grad_norm=grad_norm,
            adjoint_norm=adjoint_norms,
            samples=self.global_step * self.config.train.total_batch_size,
            active_steps=plan.active.sum(0).double().mean().item(),
        )  # fmt: skip

    def add_gradients(self, key: tuple[int, int | str], indices: torch.Tensor, plan: GradientPlan) -> SampleValues:
        """Adds the part of some samples in ∂(mean loss of the global batch)/∂θ to the `.grad` of θ.

        Args:
            key: the key of the random numbers of this optimizer step.
            indices: the positions of the samples in the global batch, int [B].
            plan: which part of each sample's chain carries gradient.

        Returns:
            The losses and rewards of the samples.
        """
        prompts, metadata = draw_prompts(self.prompts, *key, indices)
        return self.gradient(self.rollout(key))(key, indices, prompts, metadata, plan)

    def gradient(self, rollout: Rollout) -> RewardGradient:
        """Returns the gradient computation under the current memory policy, which a trial step may still change."""
        run = self.run
        return RewardGradient(
            run.model, rollout, run.reward, run.residency, run.accelerator.backward, **gradient_options(run.config)
        )

    def try_memory(self) -> None:
        rollout, size, seed = self.run.rollout, self.run.choice.capacity, self.config.seed
        draws = 1 + TRIED // self.config.train.total_batch_size
        plans = [self.plan(rollout, (seed, f"trial {draw}")) for draw in range(draws)]
        counts = [plan.active.sum(dim=0).sort(descending=True) for plan in plans]
        plan, longest = max(zip(plans, counts, strict=True), key=lambda pair: pair[1].values[:size].sum())
        self.add_gradients((seed, "trial"), torch.arange(size), plan.select(longest.indices[:size]))

    def _adjoint_norms(self, rollout: Rollout) -> list[float | None]:
        """Returns the norm of ∂(loss of a sample)/∂x[i] for i = 0 … N, as a mean over samples.

        The mean at x[i] is over the samples with an active step before x[i], and x̂0 takes the place of x[i] where a
        sample leaves the chain. It is None if there is no such sample, and so always at x[0].
        """
        accelerator = self.run.accelerator
        totals = accelerator.reduce(rollout.adjoint_norms.take().float().to(accelerator.device), "sum").cpu()
        # The adjoints belong to the scaled mean loss. This factor turns them into those of each sample's own loss.
        loss_scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
        factor = self.config.train.total_batch_size / loss_scale
        return [float(f"{total / count * factor:.4g}") if count else None for total, count in totals.T.tolist()]
