"""Everything a run is made of, built from the configuration, in the order in which mistakes are cheapest to find."""

from contextlib import nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.callbacks import FROM_FUNCTION, PromptFunction, with_names
from alignprop.engine.processes import on_main
from alignprop.engine.seeding import generators
from alignprop.engine.sharding import check_engine, check_policy, is_fsdp
from alignprop.engine.speed import use_channels_last
from alignprop.evaluation.evaluate import Evaluation, Evaluator
from alignprop.evaluation.judges import build_judges, measured
from alignprop.evaluation.stop_when import parse_stop_when, reason_to_stop, values
from alignprop.memory.planner import candidates, choose_policy
from alignprop.memory.residency import Residency
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.models.base import Model
from alignprop.models.loading import load_model
from alignprop.prompts import draw_prompts, load_prompts
from alignprop.publish.hub import check_hub
from alignprop.runs.checkpoint import find_checkpoint
from alignprop.runs.manifest import base_model, check_base
from alignprop.runs.records import Records, choose_folder
from alignprop.runs.tracking import log_images, log_row, parse_log_with, start_trackers
from alignprop.settings.errors import ConfigError, one_of
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.resolve import components_left_out, memory_policy, resolve, settle
from rewards import require_differentiable


class Run:
    """A model, a reward and prompts, on the processes and devices at hand, with a folder for the results.

    Args:
        config: an unresolved configuration (config/align_prop.py).
        reward_function: used instead of building `reward_fn`; any `reward(images, prompts, metadata) -> scores [B]`.
        model: used instead of loading `pretrained.model`.
        needs_gradient: the reward must be differentiable.
        prompts: of a person's own function, for `eval_prompt_fn` = "prompt_function".

    Raises:
        ConfigError, rewards.RewardError: one line for a mistake in the configuration.
    """

    def __init__(
        self, config: ConfigDict, reward_function=None, model: Model | None = None, needs_gradient=False,
        prompts: PromptFunction | None = None,
    ):  # fmt: skip
        # accelerate starts several processes on a CPU only when told that it is one.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu, timeout=timedelta(minutes=config.timeout_minutes))
        self.config = c = resolve(with_names(config, reward_fn=reward_function), state.num_processes)
        if c.mixed_precision == "fp16" and state.device.type == "cpu":
            raise ConfigError("mixed_precision = 'fp16' needs a GPU; on a CPU use 'no' or 'bf16'")
        log_with = parse_log_with(c.log_with)
        if prompts and c.eval_prompt_fn == FROM_FUNCTION:
            self.eval_prompts = prompts.fixed(c.seed, c.num_eval_prompts or c.num_eval_images)
        else:
            self.eval_prompts = load_prompts(c.eval_prompt_fn, "eval_prompt_fn")
        names = measured(c, self.eval_prompts, reward_function)
        self._best_by, self._stop_when = "reward", []
        if c.task == "train":
            self._best_by = one_of("best_by", c.best_by or "reward", names)
            self._stop_when = parse_stop_when(c.stop_when, names)
        self.checkpoint = None
        if c.resume_from:
            self.checkpoint = on_main(lambda: find_checkpoint(c.resume_from, c.log_dir, run_name=c.run_name))
        if c.resume_from and not self.checkpoint and c.task != "train":
            raise ConfigError(f"resume_from = {c.resume_from!r}, but run_name = {c.run_name!r} has no checkpoint")
        self.folder = on_main(lambda: choose_folder(c, self.checkpoint))
        if c.task == "train" and c.hub.repo:
            on_main(lambda: check_hub(c.hub.repo, c.hub.private))
        self.records = Records(self.folder, c, self.checkpoint)
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=c.mixed_precision,
            # The trainer sums micro-batches itself; without this, the environment could have accelerate divide losses.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=log_with,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder)),
        )
        check_engine(self.accelerator, c.use_lora, c.train.optimizer, c.train_text_encoder)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = c.allow_tf32

        self.judges = build_judges(c, self.eval_prompts, reward_function)
        self.reward = self.judges.reward
        if needs_gradient:
            require_differentiable(self.reward)
        self.model = model or self._load_model()
        self.model.device = self.accelerator.device
        if c.guidance_scale != 1 and not self.model.takes_guidance:
            self.say(f"warning: guidance_scale = {c.guidance_scale} has no effect: this model is distilled without it")
        self.base = base_model(c.pretrained.model, self.model.denoiser)
        if self.checkpoint:
            check_base(self.checkpoint, self.base)
        on_one_cpu = self.accelerator.device.type == "cpu" and not is_fsdp(self.accelerator)
        if on_one_cpu if c.channels_last is None else c.channels_last:
            use_channels_last(self.model)
        self._open = c
        self.use_policy(*on_main(lambda: choose_policy(c, self.model, self.reward, self.accelerator, self.say)))
        self._try_rewards(needs_gradient)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def open_folder(self, step: int) -> None:
        """Makes the run folder that of a run at optimizer step `step`, and starts the trackers."""
        on_main(lambda: self.records.open(step))
        start_trackers(self.accelerator, "alignprop", self.folder.name, self.folder, self.config.to_dict())

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        found = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(found, "sum"))

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation at `step` has been reported."""
        return on_main(lambda: self.records.is_evaluated(step))

    def reason_to_stop(self) -> str:
        """Why the newest evaluation ends training; "" where it does not."""

        def find() -> str:
            return reason_to_stop(self._stop_when, [values(row, self.reward) for row in self.records.evaluations()])

        return on_main(find) if self._stop_when else ""

    def prune_checkpoints(self) -> None:
        if self.is_main:
            self.records.prune_checkpoints(lambda row: values(row, self.reward).get(self._best_by))

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
        """Draws and logs an evaluation during training; the run folder gets it while training goes on."""
        row = {**evaluation.row(), "step": step, "epoch": epoch}
        if self.is_main:
            self.records.report(evaluation, row)
            log_images(self.accelerator, "samples", evaluation.images, evaluation.labels(), step)
        log_row(self.accelerator, row)
        told = {**row["rewards"], **evaluation.measures}
        self.say(f"step {step}: held-out " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()))

    def finish(self, stopped: str = "") -> None:
        """Waits for every process, since launchers end all when one has ended; says how it went, ends the trackers."""
        self.records.wait()
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.say(stopped or self.records.summary())
        self.accelerator.end_training()
        self.records.close()

    def _try_rewards(self, needs_gradient: bool) -> None:
        """Has two pictures of noise judged."""
        self.residency.enter("decode")
        with torch.no_grad():
            images = self.model.decode(self.model.init_latents(generators(range(2), self.config.seed, "trial")))
        prompts, metadata = draw_prompts(self.eval_prompts, self.config.seed, 0, range(2))
        self.judges.try_on(images, prompts, metadata, needs_gradient, self.residency.enter)

    def use_policy(self, policy: str, capacity: int) -> None:
        """Everything that depends on the memory policy and the capacity: these, where the configuration says "auto"."""
        self.policy = policy
        self.config = c = settle(self._open, self.accelerator.num_processes, policy, capacity)
        self.records.config = c
        self.memory = memory_policy(c)
        check_policy(self.accelerator, self.memory, c.compile, c.channels_last)
        phases = {
            "encode": self.model.text_encoders,
            "denoise": [self.model.denoiser],
            "decode": [self.model.decoder, self.reward],
            "measure": [judge for judge in self.judges.phases["measure"] if judge],
        }
        self.residency = Residency(self.accelerator.device, phases, self.memory.residency)
        sampling = self._rollout("num_inference_steps")
        self.rollout = self._rollout("train.num_inference_steps") if c.task == "train" else sampling
        self.evaluator = Evaluator(
            sampling, self.judges, self.eval_prompts, self.accelerator, num_images=c.num_eval_images,
            num_prompts=c.num_eval_prompts, batch_size=c.per_gpu_capacity, decode_chunk=self.memory.decode_chunk,
            seed=c.seed, keep=c.max_vis_images, base_distance=c.eval_base_distance, enter=self.residency.enter,
        )  # fmt: skip

    def use_next_policy(self, reason: str) -> None:
        """Takes the next more frugal memory policy, or the next smaller capacity, of those left to choose from.

        Raises:
            ConfigError: with the `reason`, where nothing is.
        """
        policy, capacity = self.policy, self.config.per_gpu_capacity
        names = tuple(POLICIES) if self._open.memory_policy == "auto" else (policy,)
        options = candidates(self._open, self.accelerator.num_processes, names)
        tried = [option[0] == policy and option[2] == capacity for option in options].index(True)
        # Lean layers stay so.
        rest = [option for option in options[tried + 1 :] if option[1].lean >= self.memory.lean]
        if not rest:
            raise ConfigError(f"memory_policy = {policy!r}, per_gpu_capacity = {capacity} does not fit: {reason}")
        self.say(f"memory_policy {policy!r} with {capacity} samples does not fit ({reason}); trying {rest[0][0]!r}")
        self.residency.leave()
        self.use_policy(rest[0][0], rest[0][2])

    def _rollout(self, field: str) -> Rollout:
        c, steps = self.config, self.config
        for name in field.split("."):
            steps = steps[name]
        sampler = build_sampler(self.model.scheduler, steps, c.eta, field, **self.model.schedule(steps))
        return Rollout(
            self.model, sampler, c.guidance_scale, self._autocast, c.adjoint_clip, c.guidance_grad, self.memory
        )

    def _autocast(self):
        """Frozen weights compute in their own precision; those that are trained are float32, whatever the run's."""
        is_whole = next(self.model.denoiser.parameters()).dtype == torch.float32
        return self.accelerator.autocast() if is_whole else nullcontext()

    def _load_model(self) -> Model:
        c = self.config
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[c.mixed_precision]
        source = c.pretrained
        return load_model(
            source.model, revision=source.revision, config=source.config, vae=source.vae,
            without=components_left_out(c), dtype=dtype, full=not c.use_lora, resolution=c.resolution,
            true_cfg_scale=c.true_cfg_scale, train_text_encoder=c.task == "train" and c.train_text_encoder,
        )  # fmt: skip
