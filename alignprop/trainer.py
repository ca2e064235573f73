"""AlignProp: fine-tuning a text-to-image model by back-propagating a reward through its sampling chain.

Prabhudesai et al. 2023, arXiv 2310.03739. `AlignPropTrainer.step` is the method; the rest is the loop around it.
"""

import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from alignprop.checkpoint import random_state, read_state, restore_random_state, set_aside_after, write_checkpoint
from alignprop.estimators import ESTIMATORS, build_estimator
from alignprop.evaluate import Evaluation
from alignprop.lora import add_lora, get_lora, read_lora, save_lora, trainable_parameters, update_lora
from alignprop.losses import LOSSES
from alignprop.prompts import draw_prompts, load_prompts
from alignprop.run import Run
from alignprop.seeding import generator, generators
from alignprop.settings import ConfigError, one_of
from rewards import check_rewards


class AlignPropTrainer:
    """Trains a LoRA (or the whole denoiser) for a differentiable reward.

    Args:
        config: see config/align_prop.py.
        model: used instead of loading `config.pretrained.model`.
        reward: used instead of building `config.reward_fn`; any `reward(images, prompts, metadata) -> scores [B]`.

    Raises:
        ConfigError, rewards.RewardError: one line for a mistake in the configuration.
    """

    def __init__(self, config, model=None, reward=None):
        one_of("estimator", config.estimator, [name for name in ESTIMATORS if name != "none"])
        self.prompts = load_prompts(config.prompt_fn, "prompt_fn")
        self.run = Run(config, model, reward, needs_gradient=True)
        self.config = c = self.run.config
        self.estimator = build_estimator(c.estimator, c.trunc_backprop_timestep, c.truncated_backprop_minmax)
        self.loss = LOSSES[c.loss]

        denoiser = self.run.model.denoiser
        if c.use_lora:
            add_lora(denoiser, c.lora_rank, c.lora_alpha, c.lora_target_modules, c.seed)
        else:
            denoiser.float().requires_grad_(True)
        self.parameters = list(trainable_parameters(denoiser).values())
        optimizer = torch.optim.AdamW(
            self.parameters, c.train.learning_rate, (c.train.adam_beta1, c.train.adam_beta2), c.train.adam_epsilon,
            c.train.adam_weight_decay,
        )  # fmt: skip
        self.ema = EMAModel(self.parameters, decay=c.train.ema_decay) if c.train.ema_decay else None
        self.rollout, self.optimizer = self.run.accelerator.prepare(self.run.rollout, optimizer)
        self.global_step, self.skipped_steps, self.skipped_in_a_row = 0, 0, 0
        self.samples_bar = tqdm(disable=True)
        self.reward_checked = False
        if self.run.checkpoint:
            self._restore(self.run.checkpoint)

    def train(self) -> None:
        """The whole run: evaluate, then epochs of steps, evaluations and checkpoints, then a summary."""
        c, run = self.config, self.run
        run.open_folder()
        if run.is_main:
            # A run that starts over drops also the evaluation of step 0.
            run.metrics.truncate_after(self.global_step or -1)
            set_aside_after(run.folder, self.global_step)
        if self.global_step == 0:
            self.evaluate()
        first_epoch = self.global_step // c.train.steps_per_epoch
        epochs = range(first_epoch, c.num_epochs)
        shown = {"disable": not run.is_main}
        for epoch in tqdm(epochs, initial=first_epoch, total=c.num_epochs, desc="epochs", **shown):
            samples = c.train.total_samples_per_epoch
            with tqdm(total=samples, desc=f"epoch {epoch}", unit="sample", leave=False, **shown) as self.samples_bar:
                for _ in range(c.train.steps_per_epoch):
                    run.log(self.step())
            last = epoch + 1 == c.num_epochs
            if last or (c.eval_freq and (epoch + 1) % c.eval_freq == 0):
                self.evaluate()
            if last or (epoch + 1) % c.save_freq == 0:
                self.save()
        run.finish()

    def step(self) -> dict:
        """One optimizer step over `total_batch_size` samples (Algorithm 1 of the paper); returns its metrics row."""
        c, run, started = self.config, self.run, time.perf_counter()
        key = (c.seed, self.global_step)
        plan = self.estimator(c.num_inference_steps, c.train.total_batch_size, generator(*key, "plan"))
        samples = []
        for indices in self._micro_batches():
            with run.accelerator.accumulate(self.rollout):
                prompts, metadata = draw_prompts(self.prompts, *key, indices)
                cond = run.model.encode_prompts(prompts)
                latents = self.rollout(generators(indices, *key, "noise"), cond, plan.select(indices))
                images = run.model.decode(latents)
                terms = run.reward.score_terms(images, prompts, metadata)
                rewards = run.reward.combine(terms)
                if not self.reward_checked:
                    self.reward_checked = True
                    check_rewards(rewards, images, run.reward, needs_gradient=True)
                losses = c.train.loss_coeff * c.grad_scale * self.loss(rewards, c.loss_target)
                run.accelerator.backward(losses.mean())
            samples.append(torch.stack([losses, rewards, *terms.values()]).detach())
            self.samples_bar.update(len(indices) * run.accelerator.num_processes)
        losses, rewards, *terms = run.accelerator.gather(torch.cat(samples, dim=1).T.contiguous()).T
        adjoint_norms = self._adjoint_norms()
        grad_norm = self._update(losses)
        self.global_step += 1
        return {
            "kind": "train",
            "step": self.global_step,
            "epoch": (self.global_step - 1) // c.train.steps_per_epoch,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "rewards": {name: term.mean().item() for name, term in zip(run.reward.terms, terms, strict=True)},
            "loss": losses.mean().item(),
            "grad_norm": grad_norm,
            "adjoint_norm": adjoint_norms,
            "active_steps": plan.active.sum(0).double().mean().item(),
            "skipped_steps": self.skipped_steps,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def evaluate(self) -> Evaluation:
        """Held-out rewards and pictures with the weights (or their moving average) of now."""
        run = self.run
        with self._averaged_weights():
            evaluation = run.evaluator()
        run.report(evaluation, self.global_step, epoch=self.global_step // self.config.train.steps_per_epoch)
        return evaluation

    def save(self) -> Path | None:
        """Writes checkpoints/checkpoint_<step>; its path on the main process."""
        c, run, denoiser = self.config, self.run, self.run.model.denoiser
        random_states = gather_object([random_state()])
        if not run.is_main:
            return None
        scaler = run.accelerator.scaler
        state = {
            "global_step": self.global_step,
            "skipped_steps": self.skipped_steps,
            "weights": {name: p.detach().cpu() for name, p in trainable_parameters(denoiser).items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "ema": self.ema.state_dict() if self.ema else None,
            "random": random_states,
        }

        def write_weights(folder: Path) -> None:
            with self._averaged_weights():
                if c.use_lora:
                    save_lora(run.model, get_lora(denoiser), folder)
                else:
                    denoiser.save_pretrained(folder / "denoiser")

        return write_checkpoint(run.folder, self.global_step, state, write_weights, c.num_checkpoint_limit)

    def _micro_batches(self):
        """The indices in the global batch of each micro-batch of this process."""
        size, accelerator = self.config.per_gpu_capacity, self.run.accelerator
        for i in range(self.config.train.gradient_accumulation_steps):
            first = (i * accelerator.num_processes + accelerator.process_index) * size
            yield torch.arange(first, first + size)

    def _update(self, losses: torch.Tensor) -> float:
        """Clips and applies the accumulated gradient, unless it or a loss is not finite; returns its norm."""
        c, accelerator = self.config, self.run.accelerator
        grad_norm = float(accelerator.clip_grad_norm_(self.parameters, c.train.max_grad_norm))
        finite_loss = bool(losses.isfinite().all())
        finite = finite_loss and grad_norm < float("inf")
        # The loss scaler skips a non-finite gradient by itself, and has to see it to lower its scale.
        if finite or (finite_loss and accelerator.scaler):
            self.optimizer.step()
        elif accelerator.scaler:
            accelerator.scaler.update()
        self.optimizer.zero_grad()
        if finite and self.ema:
            self.ema.step(self.parameters)
        self.skipped_steps += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= c.train.max_skipped_steps:
            raise ConfigError(
                f"{self.skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient; the run stops, "
                f"its checkpoints are in {str(self.run.folder / 'checkpoints')!r}; try mixed_precision='bf16', a "
                "smaller train.learning_rate or adjoint_clip=10"
            )
        return grad_norm

    def _adjoint_norms(self) -> list[float | None]:
        """Mean over samples of ‖∂(sample's loss)/∂x[i]‖, i = 0 … N; None where no gradient needed it."""
        c, accelerator = self.config, self.run.accelerator
        totals = accelerator.reduce(self.run.rollout.adjoint_norms.take().float().to(accelerator.device), "sum").cpu()
        # Undo the means over micro-batch and accumulation, and the loss scale.
        factor = c.per_gpu_capacity * c.train.gradient_accumulation_steps
        factor /= accelerator.scaler.get_scale() if accelerator.scaler else 1.0
        return [float(f"{s / n * factor:.4g}") if n else None for s, n in totals.T.tolist()]

    @contextmanager
    def _averaged_weights(self):
        """Within it the trained weights are their moving average, where one is kept."""
        if self.ema:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.ema:
                self.ema.restore(self.parameters)

    def _restore(self, checkpoint: Path) -> None:
        if self.config.use_lora:
            update_lora(self.run.model.denoiser, read_lora(checkpoint))  # refuses another model or rank
        state = read_state(checkpoint)
        own = trainable_parameters(self.run.model.denoiser)
        if {name: p.shape for name, p in own.items()} != {name: w.shape for name, w in state["weights"].items()}:
            raise ConfigError(
                f"resume_from = {str(checkpoint)!r} trained other weights; use_lora or pretrained.model differ"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state["weights"][name])
        # What the user asks for now counts, not what the checkpoint's run was asked for.
        wanted = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(own)
        if self.run.accelerator.scaler and state["scaler"]:
            self.run.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.run.accelerator.device)
        self.global_step, self.skipped_steps = state["global_step"], state["skipped_steps"]
        rank = self.run.accelerator.process_index
        if rank < len(state["random"]):
            restore_random_state(state["random"][rank])
        self.run.say(f"continuing {str(checkpoint)!r} after optimizer step {self.global_step}")
