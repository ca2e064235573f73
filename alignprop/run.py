"""Builds all parts of a run. Cheap checks come first, so that most mistakes are found before a model is loaded."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.callbacks import FROM_FUNCTION, PromptFunction, with_names
from alignprop.engine.optimizers import check_package
from alignprop.engine.processes import make_accelerator, on_main, start_processes
from alignprop.engine.seeding import generators
from alignprop.engine.sharding import check_engine, check_policy, is_fsdp
from alignprop.engine.speed import use_channels_last
from alignprop.evaluation.evaluate import Evaluator
from alignprop.evaluation.judges import Judges, build_judges, measured
from alignprop.evaluation.results import Evaluation
from alignprop.evaluation.stop_when import check_measured, parse_stop_when, reason_to_stop, values
from alignprop.lora.frozen import merge_frozen, parse_loras
from alignprop.lora.scaling import linear_schedule
from alignprop.memory.checkpointing import decode_in_tiles
from alignprop.memory.planner import Choice, choose_policy
from alignprop.memory.quantize import check_formats, quantize
from alignprop.memory.residency import Residency, phases_of
from alignprop.method.prefix_cache import build_prefix_cache
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import chain_of
from alignprop.models.base import Model
from alignprop.models.loading import PRECISIONS, load_model
from alignprop.prompts import PromptSet, draw_prompts, load_prompts, negatives_of
from alignprop.publish.hub import check_hub
from alignprop.runs.checkpoint import find_checkpoint
from alignprop.runs.manifest import base_model, check_base
from alignprop.runs.records import Records, choose_folder
from alignprop.runs.tracking import log_images, log_row, parse_log_with, start_trackers
from alignprop.settings.errors import ConfigError
from alignprop.settings.options import chain_options, model_options, prefix_cache_options, rollout_options
from alignprop.settings.resolve import as_run, check_truncation, resolve
from alignprop.settings.sizes import picture_sizes
from rewards import WeightedReward, require_differentiable


def build_run(
    config: ConfigDict, reward_function=None, model: Model | None = None, needs_gradient=False,
    prompts: PromptFunction | PromptSet | None = None,
) -> "Run":  # fmt: skip
    """Checks what a run needs, the cheapest check first, and builds the run.

    Args:
        config: an unresolved configuration (docs/config.md).
        reward_function: used instead of building `reward_fn`; any `reward(images, prompts, metadata) -> scores [B]`.
        model: used instead of loading `pretrained.model`.
        needs_gradient: whether the reward must be differentiable.
        prompts: the prompts of training, if any. If they are the user's own function, `eval_prompt_fn` =
            "prompt_function" evaluates on its prompts.

    Raises:
        ConfigError, rewards.RewardError: the configuration has a mistake. The message is one line.
    """
    state = start_processes(config.timeout_minutes)
    c = resolve(with_names(config, reward_fn=reward_function), state.num_processes)
    if c.mixed_precision == "fp16" and state.device.type == "cpu":
        raise ConfigError("mixed_precision = 'fp16' needs a GPU; on a CPU use 'no' or 'bf16'")
    if c.task == "train":
        check_package(c.train.optimizer)
    check_formats(c)
    log_with = parse_log_with(c.log_with)
    eval_prompts = _load_eval_prompts(c, prompts)
    sets = [one for one in (eval_prompts, prompts) if isinstance(one, PromptSet) and one.name != FROM_FUNCTION]
    negatives = negatives_of(*sets)
    frozen = parse_loras(c.pretrained.loras)
    best_by, stop_when = _check_guards(c, measured(c, eval_prompts, reward_function))
    checkpoint = _find_checkpoint(c)
    start = _find_start(c) if not checkpoint else None
    records = Records(on_main(lambda: choose_folder(c, checkpoint)), c, checkpoint)
    if c.task == "train" and c.hub.repo:
        on_main(lambda: check_hub(c.hub.repo, c.hub.private))
    accelerator = make_accelerator(c.mixed_precision, log_with, records.folder)
    check_engine(accelerator, c.use_lora, c.train.optimizer, c.train_text_encoder)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = c.allow_tf32

    judges = build_judges(c, eval_prompts, reward_function)
    if needs_gradient:
        require_differentiable(judges.reward)
    model = _in_largest_size(model, c) if model else load_model(
        c.pretrained.model, dtype=PRECISIONS[c.mixed_precision], **model_options(c)
    )  # fmt: skip
    merge_frozen(model, frozen)
    if negatives and not hasattr(model, "negatives"):
        raise ConfigError("the column negative_prompt needs a model with `negatives` (models/base.py)")
    model.negatives = negatives
    model.device = accelerator.device
    base = base_model(c.pretrained.model, model.denoiser)
    quantize(model, judges, c, accelerator.device if accelerator.device.type == "cuda" else None)
    for path, named_by in ((checkpoint, "resume_from"), (start, "init_lora")):
        if path:
            check_base(path, base, named_by)
    on_one_cpu = accelerator.device.type == "cpu" and not is_fsdp(accelerator)
    if on_one_cpu if c.channels_last is None else c.channels_last:
        use_channels_last(model)

    run = Run(c, accelerator, records, eval_prompts, judges, model, base, checkpoint, start, best_by, stop_when)
    _tell_what_differs(run, config)
    run.use(on_main(lambda: choose_policy(c, model, judges, accelerator, run.say)))
    run.try_judges(needs_gradient)
    return run


def _in_largest_size(model: Model, c: ConfigDict) -> Model:
    """Returns a model that the user gave, for the largest pictures of `resolution`.

    Raises:
        ConfigError: the model has only its own size.
    """
    if c.resolution is None:
        return model
    if not hasattr(model, "of_size"):
        raise ConfigError(f"resolution = {c.resolution!r} needs a model with `of_size` (models/base.py), or None")
    return model.of_size(picture_sizes(c.resolution)[0])


def _tell_what_differs(run: "Run", asked: ConfigDict) -> None:
    """Says in which points the run differs from what the unresolved configuration asks for."""
    c = run.config
    if c.per_gpu_capacity != asked.per_gpu_capacity:
        run.say(
            f"per_gpu_capacity = {asked.per_gpu_capacity}: micro-batches have {c.per_gpu_capacity} samples, the "
            f"largest size that divides a step of {c.train.total_batch_size} samples on "
            f"{run.accelerator.num_processes} process(es)"
        )
    if len(sizes := picture_sizes(c.resolution)) > 1:
        run.say("picture sizes, width x height: " + ", ".join(f"{width}x{height}" for height, width in sizes))
    if c.init_lora and run.checkpoint and c.task == "train":
        run.say(f"init_lora = {c.init_lora!r} is not used: the run continues from a checkpoint")
    for option in ("clip_sample", "thresholding"):
        if run.model.scheduler.config.get(option):
            run.say(f"warning: {option} of the model's scheduler is not used: a step has to be linear")
    if c.guidance_scale != 1 and not run.model.takes_guidance:
        run.say(f"warning: guidance_scale = {c.guidance_scale} has no effect: this model is distilled without it")
    if run.model.negatives and c.guidance_scale == c.true_cfg_scale == 1:
        run.say("warning: the column negative_prompt of the prompts has no effect without guidance")
    negative = c.negative_prompt or run.model.negatives
    for_guidance = {"negative_prompt": negative, "guidance_interval": tuple(c.guidance_interval) != (0, 1)}
    for name in (name for name, is_set in for_guidance.items() if is_set):
        if len(run.model.branches(run.model.blank_conditioning(1), 2.0)) == 1:
            run.say(f"warning: {name} has no effect: this model has no unconditional branch of guidance")


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


def _load_eval_prompts(c: ConfigDict, prompts: PromptFunction | PromptSet | None) -> PromptSet:
    if isinstance(prompts, PromptFunction) and c.eval_prompt_fn == FROM_FUNCTION:
        return prompts.fixed(c.seed, c.num_eval_prompts or c.num_eval_images)
    return load_prompts(c.eval_prompt_fn, "eval_prompt_fn")


def _check_guards(c: ConfigDict, measures: list[str]) -> tuple[str, list]:
    """Checks and returns `best_by` and `stop_when`, which name measures of an evaluation."""
    if c.task != "train":
        return "reward", []
    return check_measured("best_by", c.best_by or "reward", measures), parse_stop_when(c.stop_when, measures)


def _find_checkpoint(c: ConfigDict) -> Path | None:
    if not c.resume_from:
        return None
    checkpoint = on_main(lambda: find_checkpoint(c.resume_from, c.log_dir, run_name=c.run_name))
    if not checkpoint and c.task != "train":
        raise ConfigError(f"resume_from = {c.resume_from!r}, but run_name = {c.run_name!r} has no checkpoint")
    return checkpoint


def _find_start(c: ConfigDict) -> Path | None:
    """Returns the LoRA that `init_lora` names, or None."""
    if c.task != "train" or not c.use_lora or not c.init_lora:
        return None
    if c.init_lora == "latest":
        raise ConfigError("init_lora = 'latest' must name a LoRA; 'latest' is for resume_from")
    start = on_main(lambda: find_checkpoint(c.init_lora, c.log_dir, "init_lora"))
    if (start / "denoiser").is_dir():
        raise ConfigError(f"init_lora = {c.init_lora!r} has full weights (in denoiser/) and no LoRA")
    return start
