"""Builds all parts of a run. Cheap checks come first, so that most mistakes are found before a model is loaded."""

from pathlib import Path

import torch
from ml_collections import ConfigDict

from alignprop.callbacks import FROM_FUNCTION, PromptFunction, with_names
from alignprop.engine.optimizers import check_package
from alignprop.engine.processes import make_accelerator, on_main, start_processes
from alignprop.engine.sharding import check_engine, is_fsdp
from alignprop.engine.speed import use_channels_last
from alignprop.evaluation.judges import build_judges, measured
from alignprop.evaluation.stop_when import check_measured, parse_stop_when
from alignprop.lora.frozen import find_loras, merge_frozen, parse_loras
from alignprop.memory.planner import choose_policy
from alignprop.memory.quantize import check_formats, quantize
from alignprop.models.base import Model
from alignprop.models.loading import PRECISIONS, load_model
from alignprop.prompts import PromptSet, load_prompts, negatives_of
from alignprop.publish.hub import check_hub
from alignprop.run import Run
from alignprop.runs.checkpoint import find_checkpoint
from alignprop.runs.manifest import base_model, check_base
from alignprop.runs.records import Records, choose_folder
from alignprop.runs.tracking import parse_log_with
from alignprop.settings.errors import ConfigError
from alignprop.settings.options import model_options
from alignprop.settings.resolve import resolve
from alignprop.settings.sizes import picture_sizes
from rewards import require_differentiable


def build_run(
    config: ConfigDict, reward_function=None, model: Model | None = None, needs_gradient=False,
    prompts: PromptFunction | PromptSet | None = None,
) -> Run:  # fmt: skip
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
    frozen = find_loras(parse_loras(c.pretrained.loras))
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
    model = _in_largest_size(model, c) if model else _load_model(c)
    merge_frozen(model, frozen)
    if negatives and not hasattr(model, "negatives"):
        raise ConfigError("the column negative_prompt needs a model with `negatives` (models/base.py)")
    model.negatives, model.device = negatives, accelerator.device
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


def _load_model(c: ConfigDict) -> Model:
    return load_model(c.pretrained.model, dtype=PRECISIONS[c.mixed_precision], **model_options(c))


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


def _tell_what_differs(run: Run, asked: ConfigDict) -> None:
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
    if c.task == "train" and c.train.optimizer == "prodigy" and c.train.learning_rate < 0.1:
        run.say(
            f"warning: train.learning_rate = {c.train.learning_rate} multiplies the step size that 'prodigy' finds, "
            "and is usually 1"
        )
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
