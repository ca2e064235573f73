"""A run: its model, judges and prompts on the available devices, and its folder."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.engine.processes import on_main
from alignprop.engine.seeding import generators
from alignprop.engine.sharding import check_policy
from alignprop.evaluation.evaluate import Evaluator
from alignprop.evaluation.judges import Judges
from alignprop.evaluation.results import Evaluation
from alignprop.evaluation.stop_when import reason_to_stop, values
from alignprop.lora.scaling import linear_schedule
from alignprop.memory.checkpointing import decode_in_tiles
from alignprop.memory.planner import Choice
from alignprop.memory.residency import Residency, phases_of
from alignprop.method.prefix_cache import build_prefix_cache
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import chain_of
from alignprop.models.base import Model
from alignprop.prompts import PromptSet, draw_prompts
from alignprop.runs.records import Records
from alignprop.runs.tracking import log_images, log_row, start_trackers
from alignprop.settings.combinations import check_truncation
from alignprop.settings.options import chain_options, prefix_cache_options, rollout_options
from alignprop.settings.resolve import as_run
from alignprop.settings.sizes import picture_sizes
from rewards import WeightedReward


@dataclass
class Run:
    """A model, its judges and prompts, on the available processes and devices, with a folder for the results.

    Attributes:
        config: the resolved configuration, which nothing changes. The values found for "auto" are in `choice`.
        accelerator: accelerate's view of the processes and devices.
        records: the run folder.
        eval_prompts: the held-out prompts.
        judges: the rewards and measures of an evaluation.
        model: the model.
        base: the description of the base model that checkpoints contain (runs/manifest.py).
        checkpoint: the checkpoint that `resume_from` names, or None.
        start: the LoRA that `init_lora` names; None if the run continues from a checkpoint or names none.
        best_by: the measure that decides which checkpoint is the best.
        stop_when: the conditions that end training.
        choice: the memory policy, and the number of samples in a micro-batch.
        residency: moves modules to the device phase by phase; it depends on `choice`.
        rollouts: the sampling chain for each size of the pictures, the largest first; they depend on `choice`.
        evaluator: evaluates on `eval_prompts`; it depends on `choice`.
    """

    config: ConfigDict
    accelerator: Accelerator
    records: Records
    eval_prompts: PromptSet
    judges: Judges
    model: Model
    base: dict
    checkpoint: Path | None
    start: Path | None
    best_by: str
    stop_when: list
    choice: Choice = field(init=False)
    residency: Residency = field(init=False)
    rollouts: list[Rollout] = field(init=False)
    evaluator: Evaluator = field(init=False)

    def __post_init__(self):
        self.residency = Residency(self.accelerator.device, {})  # nothing is moved until there is a choice

    @property
    def reward(self) -> WeightedReward:
        """The reward of the run; the other judges only measure."""
        return self.judges.reward

    @property
    def rollout(self) -> Rollout:
        """The sampling chain for the largest pictures."""
        return self.rollouts[0]

    @property
    def folder(self) -> Path:
        return self.records.folder

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def written_config(self) -> ConfigDict:
        """The configuration, with the values that were found for "auto"."""
        return as_run(self.config, self.accelerator.num_processes, self.choice.memory, self.choice.capacity)

    def use(self, choice: Choice) -> None:
        """Builds everything that depends on the memory policy and the size of a micro-batch."""
        c, memory = self.config, choice.memory
        check_policy(self.accelerator, memory, c.compile, c.channels_last)
        decode_in_tiles(self.model.decoder, memory.decode_tiles)
        self.residency.leave()  # modules that an earlier choice has on the device go back to the host
        self.choice = choice
        self.residency = Residency(self.accelerator.device, phases_of(self.model, self.judges), memory.residency)
        sampling = self.rollouts = self._rollouts(training=False)
        if c.task == "train":
            self.rollouts = self._rollouts(training=True)
            check_truncation(c, self.rollout.sampler.num_steps)
        self.evaluator = Evaluator(
            sampling, self.judges, self.eval_prompts, self.accelerator, num_images=c.num_eval_images,
            num_prompts=c.num_eval_prompts, batch_size=choice.capacity, decode_chunk=memory.decode_chunk,
            seed=c.seed, keep=c.max_vis_images, base_distance=c.eval_base_distance, phases=self.residency,
        )  # fmt: skip

    def sampling(self, guidance_scale: float) -> Rollout:
        """Returns the sampling chain of evaluations, with another strength of guidance."""
        return self._rollout(self.model, training=False, guidance_scale=guidance_scale)

    def try_judges(self, needs_gradient: bool) -> None:
        """Has two pictures of noise judged in each size, so that a broken reward is found before an evaluation."""
        prompts, metadata = draw_prompts(self.eval_prompts, self.config.seed, 0, range(2))
        for model in (rollout.model for rollout in self.rollouts):
            with self.residency("decode"), torch.no_grad():
                images = model.decode(model.init_latents(generators(range(2), self.config.seed, "trial")))
            self.judges.try_on(images, prompts, metadata, needs_gradient, self.residency)

    def open_folder(self, step: int) -> Records:
        """Prepares the run folder for a run that has made `step` steps, and starts the trackers.

        Returns:
            The records, which leave the folder to other runs at the end of a `with` block.
        """
        on_main(lambda: self.records.open(step, self.written_config))
        start_trackers(self.accelerator, "alignprop", self.folder.name, self.folder, self.written_config.to_dict())
        return self.records

    def any_process(self, flag: bool) -> bool:
        """Returns whether `flag` is true on any process. All processes have to call it."""
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum"))

    def is_evaluated(self, step: int) -> bool:
        """Returns whether an evaluation at `step` has been reported."""
        return on_main(lambda: self.records.is_evaluated(step))

    def reason_to_stop(self) -> str:
        """Returns why the newest evaluation ends training, or "" if it does not."""

        def find() -> str:
            return reason_to_stop(self.stop_when, [values(row, self.reward) for row in self.records.evaluations()])

        return on_main(find) if self.stop_when else ""

    def prune_checkpoints(self) -> None:
        if self.is_main:
            self.records.prune_checkpoints(lambda row: values(row, self.reward).get(self.best_by))

    def log(self, row: dict) -> None:
        """Appends a row to metrics.jsonl and sends its numbers to the trackers."""
        if self.is_main:
            self.records.append(row)
        log_row(self.accelerator, row)

    def say(self, text: str) -> None:
        """Prints once, whatever the number of processes, above the progress bars."""
        if self.is_main:
            tqdm.write(text)

    def report(self, evaluation: Evaluation, step: int, epoch: int) -> None:
        """Logs an evaluation during training. Its pictures and row are written while training goes on."""
        row = {**evaluation.row(), "step": step, "epoch": epoch}
        if self.is_main:
            self.records.report(evaluation, row)
            log_images(self.accelerator, "samples", evaluation.images, evaluation.labels(), step)
        log_row(self.accelerator, row)
        measures = {**row["rewards"], **evaluation.measures}
        self.say(f"step {step}: held-out " + ", ".join(f"{name} {value:.3f}" for name, value in measures.items()))

    def finish(self, stopped: str = "") -> None:
        """Waits for every process, prints how the run went, and ends the trackers.

        The wait is needed because launchers end all processes when one has ended.

        Args:
            stopped: the message of a run that was asked to stop. If it is empty, the summary is printed.
        """
        self.records.wait()
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.say(stopped or self.records.summary())
        self.accelerator.end_training()

    def _rollouts(self, training: bool, **other) -> list[Rollout]:
        if training and self.config.algorithm == "align_prop":
            other["prefix_cache"] = build_prefix_cache(self.model.denoiser, **prefix_cache_options(self.config))
        sizes = picture_sizes(self.config.resolution)
        models = map(self.model.of_size, sizes) if len(sizes) > 1 else [self.model]
        return [self._rollout(model, training, **other) for model in models]

    def _rollout(self, model: Model, training: bool, **other) -> Rollout:
        c, schedule = self.config, None
        sampler = chain_of(model, **chain_options(c, training))
        if c.task in ("evaluate", "guide") and c.lora_schedule == "linear":
            schedule = linear_schedule(sampler.timesteps, c.lora_scale)
        return Rollout(
            model, sampler, autocast=self._autocast, memory=self.choice.memory, lora_scale_at=schedule,
            **{**rollout_options(c), **other},
        )  # fmt: skip

    def _autocast(self):
        """Returns the context for network calls: autocast if the denoiser's weights are float32, else none.

        Weights that are trained whole are float32 in every run. Frozen weights compute in their own precision.
        """
        own = (p for name, p in self.model.denoiser.named_parameters() if "lora_" not in name)
        is_whole = next(own).dtype == torch.float32
        return self.accelerator.autocast() if is_whole else nullcontext()
