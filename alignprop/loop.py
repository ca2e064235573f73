"""The loop that all training algorithms share. It makes the steps, evaluates, saves, stops and resumes."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.build import build_run
from alignprop.callbacks import (
    PromptFunction,
    PromptSource,
    RewardFunction,
    SamplesHook,
    call_hook,
    check_given,
    with_names,
)
from alignprop.engine.processes import on_main
from alignprop.engine.seeding import generator
from alignprop.engine.sharding import is_fsdp
from alignprop.engine.speed import compile_blocks
from alignprop.engine.stopping import STOPPED, stop_requests
from alignprop.evaluation.results import Evaluation
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import read_lora
from alignprop.memory.checkpointing import apply_policy
from alignprop.method.rollout import Rollout
from alignprop.models.base import Model
from alignprop.prompts import PromptSet, load_prompts, told_of_draws, told_of_epoch
from alignprop.publish.hub import push_finished
from alignprop.runs.checkpoint import checkpoints_of, read_state, step_of, write_checkpoint
from alignprop.settings.resolve import changes
from alignprop.settings.sizes import picture_sizes, size_name
from alignprop.trial import use_policy_that_fits
from alignprop.weights import TrainedWeights


def now() -> tuple[float, float]:
    """Returns the time by the clock and the CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


class TrainingLoop:
    """Trains a LoRA, or the whole denoiser, with a reward. A subclass implements `step` and `try_memory`.

    Args:
        config: the configuration (docs/config.md).
        reward_function: used instead of the reward `config.reward_fn`. It is called as `reward(images, prompts,
            metadata)` and returns scores [B], or a pair of the scores and anything else.
        prompt_function: used instead of the prompts `config.prompt_fn` (callbacks.PromptFunction).
        model: used instead of the model `config.pretrained.model` (models/base.py).
        image_samples_hook: called as `hook(data, global_step, tracker)` by the main process at every evaluation. `data`
            has the first `max_vis_images` pictures (callbacks.call_hook). `tracker` is the first tracker of
            `log_with`, or None.

    Attributes:
        needs_gradient: whether the reward must be differentiable; of the class.

    Raises:
        ConfigError, rewards.RewardError: the configuration has a mistake. The message is one line.
    """

    needs_gradient = False

    def __init__(
        self, config: ConfigDict, reward_function: RewardFunction | None = None,
        prompt_function: PromptSource | None = None, model: Model | None = None,
        image_samples_hook: SamplesHook | None = None,
    ):  # fmt: skip
        check_given(config, model, image_samples_hook)
        self.check_config(config)
        self.image_samples_hook = image_samples_hook
        own_prompts = PromptFunction(prompt_function) if prompt_function else None
        self.prompts = own_prompts or load_prompts(config.prompt_fn, "prompt_fn")
        named = with_names(config, prompt_fn=prompt_function)
        self.run = run = build_run(named, reward_function, model, self.needs_gradient, self.prompts)
        self.config = c = run.config
        self.check_run()
        for field, function in (("reward_fn", reward_function), ("prompt_fn", prompt_function)):
            if function:
                run.say(f"{field} = {config[field]!r} is not used: {c[field]} takes its place")

        with run.residency("denoise"):  # the adapter is created on the device of its layers, and stays there
            start = read_lora(run.start, run.model) if run.start else None
            self.weights = TrainedWeights(run.model, c, run.accelerator, start)
        if start:
            self._say_start(start)
        apply_policy(run.model, run.choice.memory)
        if c.compile:
            compile_blocks(run.model.denoiser)
        self.global_step = 0
        self.stop_requests: list[str] = []
        self._warned: set[str] = set()
        self.reason_to_stop = ""  # not empty once an evaluation has met a condition of `stop_when`
        if run.checkpoint:
            self._restore(run.checkpoint)
        is_open = "auto" in (c.memory_policy, c.per_gpu_capacity)
        if is_open and run.accelerator.device.type == "cuda" and not is_fsdp(run.accelerator):
            use_policy_that_fits(run, self.weights, self.try_memory)

    def check_config(self, config: ConfigDict) -> None:
        """Raises ConfigError if the method cannot train with `config`. It is called before anything is loaded."""

    def check_run(self) -> None:
        """Raises ConfigError if the method cannot train with `run`, which has the model and its sampler."""

    @property
    def last_step(self) -> int:
        """The number of calls of `step` in the whole run."""
        return self.config.num_epochs * self.config.train.steps_per_epoch

    def train(self) -> None:
        """Trains from the current step to the end, saves and evaluates when due, and prints a summary.

        Training ends after `num_epochs`, or after the first evaluation that meets a condition of `stop_when`.

        Raises:
            SystemExit: the process was asked to stop (SIGTERM, SIGINT) and has saved. The exit code is `STOPPED`.
            ConfigError: the upload to `hub.repo` failed. Everything is saved by then. Only the main process raises it.
        """
        run, hub = self.run, self.config.hub
        with run.open_folder(self.global_step):
            self._train()
            run.finish()
        # The other processes do not wait for the upload, which may take longer than timeout_minutes.
        if hub.repo and run.is_main:
            run.say(f"uploaded to {push_finished(run.folder, hub.repo, hub.private)}")

    def _train(self) -> None:
        run, started = self.run, self.global_step
        progress = {"total": self.last_step, "initial": started, "unit": "step"}
        if isinstance(self.prompts, PromptSet):
            run.say(told_of_epoch(self.prompts, run.config.train.total_samples_per_epoch))
        with stop_requests() as self.stop_requests, tqdm(desc="training", disable=not run.is_main, **progress) as bar:
            self._save_and_evaluate()
            while self.global_step < self.last_step and not self.reason_to_stop and not self._stopping():
                skipped, row = self.weights.skipped, self.step()
                if self.weights.skipped > skipped:
                    run.say(f"step {self.global_step}: skipped, its loss or gradient is not finite{self._why()}")
                self._warn_of_nothing_to_learn(row)
                run.log(row)
                bar.set_postfix(epoch=row["epoch"], reward=f"{row['reward']:.4g}")
                bar.update()
                self._save_and_evaluate()
            if not self.reason_to_stop and self._stopping():
                self._stop()
        if isinstance(self.prompts, PromptSet) and run.is_main:
            samples = run.config.train.total_samples_per_epoch // run.config.train.steps_per_epoch  # of a step
            run.say(told_of_draws(self.prompts, run.config.seed, range(started, self.global_step), samples))
        if self.reason_to_stop:
            run.say(f"ended after step {self.global_step} of {self.last_step}: {self.reason_to_stop}")

    def step(self) -> dict[str, Any]:
        """Makes one training step, adds 1 to `global_step`, and returns the metrics row of the step."""
        raise NotImplementedError

    def row(
        self, rewards: torch.Tensor, terms: dict[str, torch.Tensor], started: tuple[float, float], **others: Any
    ) -> dict[str, Any]:
        """Returns the metrics row of the last step.

        Args:
            rewards: the rewards of all samples of the step, [n].
            terms: the scores of each term of the reward, [n] each, by the name of the term.
            started: `now()` at the beginning of the step.
            others: further entries of the row.
        """
        step, mean = self.global_step - 1, rewards.mean().item()
        size = self.drawn_size(self.config.seed, step)
        seconds, cpu_seconds = (round(b - a, 3) for a, b in zip(started, now(), strict=True))
        return {
            "kind": "train",
            "step": self.global_step,
            "epoch": step // self.config.train.steps_per_epoch,
            "reward": mean,
            **({"reward_by_size": {size: mean}} if size else {}),
            "reward_std": rewards.std(correction=0).item(),
            "rewards": {name: scores.mean().item() for name, scores in terms.items()},
            **others,
            "lr": self.weights.learning_rate,  # with DDPO that of the step's last update
            "skipped_steps": self.weights.skipped,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }

    def rollout(self, key: tuple[int, int | str]) -> Rollout:
        """Returns the sampling chain of a step, for pictures of the size that the key of the step draws.

        A trial step has the largest pictures.
        """
        seed, step = key
        return self.run.rollout if isinstance(step, str) else self.run.rollouts[self._place_of_size(seed, step)]

    def drawn_size(self, seed: int, step: int) -> str:
        """Returns the size that a step draws, such as "768x512"; "" if the run has only one size."""
        sizes = picture_sizes(self.config.resolution)
        return size_name(sizes[self._place_of_size(seed, step)]) if len(sizes) > 1 else ""

    def _place_of_size(self, seed: int, step: int) -> int:
        """Returns the place of the drawn size in `run.rollouts`.

        Steps come in rounds. A round has as many steps as there are sizes, and draws each size once, in random order.
        """
        count = len(self.run.rollouts)
        turn, place = divmod(step, count)
        return int(torch.randperm(count, generator=generator(seed, turn, "sizes"))[place])

    def try_memory(self) -> None:
        """Computes a micro-batch as a step may have it that needs much memory; adds to the trained weights' `.grad`."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Any]:
        """Returns plain values that the next step depends on, in addition to the state of the trained weights."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the values of `extra_state` from `state`, which has everything that a checkpoint holds."""

    def evaluate(self) -> Evaluation | None:
        """Evaluates the current weights, or their moving average if one is kept, on the held-out prompts.

        Returns:
            The evaluation; None if the run was asked to stop meanwhile.
        """
        run = self.run
        with self.weights.averaged():
            evaluation = run.evaluator(should_stop=self._stopping)
        if evaluation and self.image_samples_hook and run.is_main:
            tracker = next(iter(run.accelerator.trackers), None)
            call_hook(self.image_samples_hook, evaluation, self.global_step, tracker)
        if evaluation:
            run.report(evaluation, self.global_step, epoch=self.global_step // self.config.train.steps_per_epoch)
        return evaluation

    def save(self, for_a_stop: bool = False) -> None:
        """Writes checkpoints/checkpoint_<step>, unless it exists because the run continues from it.

        Args:
            for_a_stop: whether the run saves at this step only because it was asked to stop.
        """
        run = self.run
        run.records.wait()  # a checkpoint promises that all earlier rows are written
        if on_main(lambda: self.global_step in map(step_of, checkpoints_of(run.folder))):
            return
        state = {
            "global_step": self.global_step,
            "config": json.dumps(self.run.written_config.to_dict()),
            **self.weights.state(),
            **self.extra_state(),
        }
        if run.is_main:
            write_weights = partial(self.weights.write, state=state)
            write_checkpoint(run.folder, self.global_step, state, write_weights, run.base, for_a_stop)

    def _save_and_evaluate(self) -> None:
        """Saves and evaluates if either is due after this step and has not been done yet.

        A run that continues from a checkpoint may have been interrupted after the one and before the other.
        """
        c, run, step = self.config, self.run, self.global_step
        epoch, within_epoch = divmod(step, c.train.steps_per_epoch)
        last = step >= self.last_step
        if within_epoch and not last:
            return
        # The checkpoint is saved first, because an evaluation takes long enough to be interrupted.
        if self._saves_at(step):
            self.save()
        due = not step or last or (c.eval_freq and epoch % c.eval_freq == 0)
        if due and not run.is_evaluated(step):
            self.evaluate()
        self.reason_to_stop = run.reason_to_stop()
        if self.reason_to_stop:
            self.save()
        run.prune_checkpoints()

    def _saves_at(self, step: int) -> bool:
        """Returns whether a run saves after this step even if it is neither asked to stop nor ended by `stop_when`."""
        epoch, within_epoch = divmod(step, self.config.train.steps_per_epoch)
        return step > 0 and not within_epoch and (epoch % self.config.save_freq == 0 or step >= self.last_step)

    def _warn_of_nothing_to_learn(self, row: dict[str, Any]) -> None:
        """Warns of a step from which nothing is learned, once for each of two causes.

        Without the warning, a run of such steps ends normally although it has trained nothing.
        """
        equal = row["reward_std"] == 0 and self.config.train.total_batch_size > 1
        for cause, holds in (
            ("its gradient is exactly 0", row["grad_norm"] == 0),
            ("all its rewards are equal", equal),
        ):
            if holds and cause not in self._warned:
                self._warned.add(cause)
                self.run.say(f"warning: step {self.global_step}: {cause}; nothing is learned from such a step")

    def _why(self) -> str:
        scaling = self.run.accelerator.scaler
        return "; with fp16 this is normal for the first few steps, until the loss scale is found" if scaling else ""

    def _stopping(self) -> bool:
        """Returns whether any process was asked to stop. All processes have to call it."""
        return self.run.any_process(bool(self.stop_requests))

    def _stop(self) -> None:
        self.save(for_a_stop=not self._saves_at(self.global_step))
        self.run.finish(
            f"stopped after step {self.global_step} of {self.last_step} and saved; go on with the same "
            f"command and --config.resume_from={self.run.folder}"
        )
        raise SystemExit(STOPPED)

    def micro_batches(self) -> list[torch.Tensor]:
        """Returns, for each micro-batch of this process, the positions of its samples in the global batch."""
        size, accelerator = self.run.choice.capacity, self.run.accelerator
        at_once = size * accelerator.num_processes
        firsts = range(accelerator.process_index * size, self.config.train.total_batch_size, at_once)
        return [torch.arange(first, first + size) for first in firsts]

    def _say_start(self, start: LoraWeights) -> None:
        c, trained = self.config, len(self.weights.parameters) // 2
        ranks = {start.rank(module) for module in start.modules}
        found = ", ".join(map(str, sorted(ranks)))
        self.run.say(
            f"starting from {str(self.run.start)!r}: rank {found} in {len(start.modules)} of the {trained} layers that "
            f"are trained with lora_rank = {c.lora_rank}; the other layers start from the base model"
        )
        if c.lora_initialization != "kaiming" and ranks == {c.lora_rank} and len(start.modules) == trained:
            self.run.say(f"lora_initialization = {c.lora_initialization!r} is not used: init_lora has every weight")

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.weights.load(state, checkpoint)
        self.load_extra_state(state)
        self.global_step = state["global_step"]
        self.run.say(f"continuing {str(checkpoint)!r} after step {self.global_step}")
        for line in changes(json.loads(state["config"]), json.loads(json.dumps(self.run.written_config.to_dict()))):
            self.run.say(f"  changed: {line}")
