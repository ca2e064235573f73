"""The loop that every way of training shares: steps, and after each what is due then; stopping, saving, continuing."""

import json
import time
from functools import partial

import torch
from tqdm.auto import tqdm

from alignprop.callbacks import PromptFunction, call_hook, with_names
from alignprop.engine.processes import on_main
from alignprop.engine.sharding import is_fsdp
from alignprop.engine.speed import compile_blocks
from alignprop.evaluation.evaluate import Evaluation
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import read_lora
from alignprop.memory.checkpointing import apply_policy
from alignprop.memory.planner import next_choice
from alignprop.prompts import load_prompts
from alignprop.publish.hub import push_finished
from alignprop.run import build_run
from alignprop.runs.checkpoint import checkpoints_of, read_state, step_of, write_checkpoint
from alignprop.settings.resolve import changes
from alignprop.stopping import STOPPED, stop_requests
from alignprop.weights import TrainedWeights


def now() -> tuple[float, float]:
    """Seconds by the clock, and those that this process has computed for."""
    return time.perf_counter(), time.process_time()


class TrainingLoop:
    """Trains a LoRA (or the whole denoiser) for a reward; a subclass has the method, `step` and `try_memory`.

    Args:
        config: see docs/config.md.
        reward_function: used instead of building `config.reward_fn`; any `reward(images, prompts, metadata)` that
            returns scores [B], or a pair of them and anything.
        prompt_function: used instead of loading `config.prompt_fn`; see callbacks.PromptFunction.
        model: used instead of loading `config.pretrained.model` (models/base.py).
        image_samples_hook: `(data, global_step, tracker)`, called at every evaluation by the main process, with the
            `max_vis_images` pictures that are shown (callbacks.call_hook) and the first tracker of `log_with` or None.
        needs_gradient: the reward must be differentiable.

    Raises:
        ConfigError, rewards.RewardError: one line for a mistake in the configuration.
    """

    def __init__(
        self, config, reward_function=None, prompt_function=None, model=None, image_samples_hook=None,
        needs_gradient=False,
    ):  # fmt: skip
        self.image_samples_hook = image_samples_hook
        own_prompts = PromptFunction(prompt_function) if prompt_function else None
        self.prompts = own_prompts or load_prompts(config.prompt_fn, "prompt_fn")
        named = with_names(config, prompt_fn=prompt_function)
        self.run = run = build_run(named, reward_function, model, needs_gradient, own_prompts)
        self.config = c = run.config
        for field, function in (("reward_fn", reward_function), ("prompt_fn", prompt_function)):
            if function:
                run.say(f"{field} = {config[field]!r} is not used: {c[field]} takes its place")

        with run.residency("denoise"):  # the adapter is made where its layers are, and stays there
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
        self.reason_to_stop = ""  # what the newest evaluation said, where `stop_when` ends the run
        if run.checkpoint:
            self._restore()
        is_open = "auto" in (c.memory_policy, c.per_gpu_capacity)
        if is_open and run.accelerator.device.type == "cuda" and not is_fsdp(run.accelerator):
            self._try_policy()

    @property
    def last_step(self) -> int:
        """The number of optimizer steps of the whole run."""
        return self.config.num_epochs * self.config.train.steps_per_epoch

    def train(self) -> None:
        """The whole run, from where it is: steps, and after each what is due then; a summary.

        It ends after `num_epochs`, or with the first evaluation that meets a condition of `stop_when`.

        Raises:
            SystemExit: the process was asked to stop (SIGTERM, SIGINT) and has saved; its code is `STOPPED`.
            ConfigError: of the main process, when everything is done and saved: `hub.repo` did not get it.
        """
        run, progress = self.run, {"total": self.last_step, "initial": self.global_step, "unit": "step"}
        run.open_folder(self.global_step)
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
        if self.reason_to_stop:
            run.say(f"ended after optimizer step {self.global_step} of {self.last_step}: {self.reason_to_stop}")
        run.finish()
        hub = self.config.hub
        if hub.repo and run.is_main:  # the others have ended: none would wait for longer than timeout_minutes
            run.say(f"uploaded to {push_finished(run.folder, hub.repo, hub.private)}")

    def step(self) -> dict:
        """The next step, `global_step` + 1, which it counts; returns its metrics row."""
        raise NotImplementedError

    def row(self, rewards: torch.Tensor, terms: dict, started: tuple[float, float], **others) -> dict:
        """The metrics row of the step that was counted last.

        Args:
            rewards: of all its samples, [n]. terms: those of each single reward, [n] each, by its name.
            started: `now()` at its beginning.
            others: what else is told of it.
        """
        seconds, cpu_seconds = (round(b - a, 3) for a, b in zip(started, now(), strict=True))
        return {
            "kind": "train",
            "step": self.global_step,
            "epoch": (self.global_step - 1) // self.config.train.steps_per_epoch,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "rewards": {name: scores.mean().item() for name, scores in terms.items()},
            **others,
            "skipped_steps": self.weights.skipped,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }

    def try_memory(self) -> None:
        """One micro-batch of what needs the most memory; adds to the trained weights' `.grad`."""
        raise NotImplementedError

    def extra_state(self) -> dict:
        """What the next step depends on besides the weights, as plain values; `load_extra_state` takes it up."""
        return {}

    def load_extra_state(self, state: dict) -> None:
        """Takes up what `extra_state` had, from all that a checkpoint holds."""

    def evaluate(self) -> Evaluation | None:
        """Held-out rewards and pictures with the (averaged) weights of now; None where asked to stop meanwhile."""
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
        """Writes checkpoints/checkpoint_<step>, unless it is there: the one that this run continues from.

        Args:
            for_a_stop: a run that nobody stops would not save here.
        """
        run = self.run
        run.records.wait()  # a checkpoint says that all rows before it are written
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
        """What is due after this step and not done yet: a run may have been interrupted between any two of them."""
        c, run, step = self.config, self.run, self.global_step
        epoch, within_epoch = divmod(step, c.train.steps_per_epoch)
        last = step >= self.last_step
        if within_epoch and not last:
            return
        # Saved first, because evaluating takes long enough to be interrupted.
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
        """Whether a run saves after this step that is neither stopped nor ended early."""
        epoch, within_epoch = divmod(step, self.config.train.steps_per_epoch)
        return step > 0 and not within_epoch and (epoch % self.config.save_freq == 0 or step >= self.last_step)

    def _warn_of_nothing_to_learn(self, row: dict) -> None:
        """Once for each of two causes: a run of such steps ends well and has trained nothing."""
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
        return "; with fp16 the first few may be, until the scale of the loss is found" if scaling else ""

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; every process has to ask."""
        return self.run.any_process(bool(self.stop_requests))

    def _stop(self) -> None:
        self.save(for_a_stop=not self._saves_at(self.global_step))
        self.run.finish(
            f"stopped after optimizer step {self.global_step} of {self.last_step} and saved; go on with the same "
            f"command and --config.resume_from={self.run.folder}"
        )
        raise SystemExit(STOPPED)

    def micro_batches(self) -> list[torch.Tensor]:
        """The indices in the global batch of each micro-batch of this process."""
        size, accelerator = self.run.choice.capacity, self.run.accelerator
        at_once = size * accelerator.num_processes
        firsts = range(accelerator.process_index * size, self.config.train.total_batch_size, at_once)
        return [torch.arange(first, first + size) for first in firsts]

    def _try_policy(self) -> None:
        """Makes trial steps until the memory policy is one that fits, each time with the next more frugal one."""
        run = self.run
        while reason := self._out_of_memory():
            choice = next_choice(run.config, run.accelerator.num_processes, run.choice, reason)
            run.say(
                f"memory_policy {run.choice.policy!r} with {run.choice.capacity} samples does not fit ({reason}); "
                f"trying {choice.policy!r}"
            )
            run.use(choice)
            apply_policy(run.model, choice.memory)

    def _out_of_memory(self) -> str:
        """What `try_memory` ran out of memory with, on this process or another; "" where it fits."""
        run, error_text, moments = self.run, "", []
        try:
            moments += [torch.empty_like(p) for p in self.weights.parameters for _ in range(2)]  # the optimizer's
            with run.residency("measure"):  # what an evaluation needs besides
                pass
            self.try_memory()
        except torch.OutOfMemoryError as error:
            error_text = str(error).partition(". ")[0]
        moments.clear()
        self.weights.zero_grad()
        run.rollout.adjoint_norms.take()
        torch.cuda.empty_cache()  # what a policy left must not look like what the next one needs
        return (error_text or "another process ran out of memory") if run.any_process(bool(error_text)) else ""

    def _say_start(self, start: LoraWeights) -> None:
        ranks, trained = {start.rank(module) for module in start.modules}, len(self.weights.parameters) // 2
        found = ", ".join(map(str, sorted(ranks)))
        self.run.say(
            f"starting from {str(self.run.start)!r}: rank {found} in {len(start.modules)} of the {trained} layers that "
            f"are trained with lora_rank = {self.config.lora_rank}; all else begins at no change"
        )

    def _restore(self) -> None:
        checkpoint = self.run.checkpoint
        state = read_state(checkpoint)
        self.weights.load(state, checkpoint)
        self.load_extra_state(state)
        self.global_step = state["global_step"]
        self.run.say(f"continuing {str(checkpoint)!r} after optimizer step {self.global_step}")
        for line in changes(json.loads(state["config"]), json.loads(json.dumps(self.run.written_config.to_dict()))):
            self.run.say(f"  with another {line}")
