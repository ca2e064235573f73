"""AlignProp: fine-tuning a text-to-image model by back-propagating a reward through its sampling chain.

Prabhudesai et al. 2023, arXiv 2310.03739. `AlignPropTrainer.step` is Algorithm 1. The gradient of some samples is in
method/gradient.py, and the loop around the steps in loop.py.
"""

import torch
from tqdm.auto import tqdm

from alignprop.callbacks import check_given
from alignprop.engine.seeding import generator, seed_global
from alignprop.loop import TrainingLoop, now
from alignprop.method import estimators
from alignprop.method.estimators import ESTIMATORS, build_estimator
from alignprop.method.gradient import RewardGradient, SampleValues
from alignprop.method.plans import GradientPlan
from alignprop.prompts import draw_prompts
from alignprop.settings.errors import one_of
from alignprop.settings.options import estimator_options, gradient_options


class AlignPropTrainer(TrainingLoop):
    """Trains a LoRA (or the whole denoiser) for a differentiable reward.

    Args:
        config: see docs/config.md.
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

    def step(self) -> dict:
        """One optimizer step over `total_batch_size` samples (Algorithm 1 of the paper); returns its metrics row."""
        run, batch_size, started = self.run, self.config.train.total_batch_size, now()
        key = (self.config.seed, self.global_step)
        seed_global(*key, "global", run.accelerator.process_index)

        plan = self.estimator(run.rollout.sampler, batch_size, generator(*key, "plan"))
        progress = {"desc": f"step {self.global_step + 1}", "leave": False, "disable": not run.is_main}
        micro_batches = tqdm(self.micro_batches(), **progress)
        values = [self.add_gradients(key, indices, plan.select(indices)) for indices in micro_batches]
        values = run.accelerator.gather(SampleValues.join(values))
        adjoint_norms = self._adjoint_norms()
        grad_norm = self.weights.update(values.losses)

        self.global_step += 1
        return self.row(
            values.rewards, values.terms, started,
            loss=values.losses.mean().item(),
            **({"base_distance": values.base_distances.mean().item()} if self.config.kl_coeff else {}),
            grad_norm=grad_norm,
            adjoint_norm=adjoint_norms,
            samples=self.global_step * batch_size,
            active_steps=plan.active.sum(0).double().mean().item(),
        )  # fmt: skip

    def add_gradients(self, key: tuple[int, int | str], indices: torch.Tensor, plan: GradientPlan) -> SampleValues:
        """Adds ∂(mean loss of the global batch)/∂θ of some of its samples to θ's `.grad`.

        Args:
            key: of the optimizer step's random numbers.
            indices: the samples, by their place in the global batch.
            plan: theirs.
        """
        prompts, metadata = draw_prompts(self.prompts, *key, indices)
        return self.gradient(key, indices, prompts, metadata, plan)

    @property
    def gradient(self) -> RewardGradient:
        """With the memory policy of now, which a trial step may still change."""
        run = self.run
        return RewardGradient(
            run.model, run.rollout, run.reward, run.residency, run.accelerator.backward, **gradient_options(run.config)
        )

    def try_memory(self) -> None:
        size = self.run.choice.capacity
        plan = estimators.full(self.run.rollout.sampler, size)
        self.add_gradients((self.config.seed, "trial"), torch.arange(size), plan)

    def _adjoint_norms(self) -> list[float | None]:
        """Mean over samples of ‖∂(sample's loss)/∂x[i]‖, i = 0 … N; None where no gradient needed it."""
        accelerator = self.run.accelerator
        totals = accelerator.reduce(self.run.rollout.adjoint_norms.take().float().to(accelerator.device), "sum").cpu()
        # Undo the mean over the global batch and the loss scale.
        loss_scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
        factor = self.config.train.total_batch_size / loss_scale
        return [float(f"{total / count * factor:.4g}") if count else None for total, count in totals.T.tolist()]
