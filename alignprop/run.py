"""Everything a run is made of, built from the configuration, in the order in which mistakes are cheapest to find."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, parse_flag_from_env
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from alignprop.checkpoint import checkpoints_of, clean_up, find_checkpoint, prune, run_folder_of
from alignprop.evaluate import Evaluation, Evaluator
from alignprop.manifest import base_model, check_base
from alignprop.models import load_model
from alignprop.models.base import Model
from alignprop.pictures import plot_curves, save_before_after, save_grid
from alignprop.prompts import load_prompts
from alignprop.rollout import Rollout
from alignprop.samplers import ddim_sampler
from alignprop.settings import ConfigError, resolve, save_config
from alignprop.tracking import MetricsLog, log_images, log_row, parse_log_with, start_trackers
from rewards import WeightedReward, as_reward, build_reward, parse_spec, require_differentiable


class Run:
    """A model, a reward and prompts, on the processes and devices at hand, with a folder for the results.

    Args:
        config: an unresolved configuration (config/align_prop.py).
        model: used instead of loading `pretrained.model`.
        reward: used instead of building `reward_fn`; any `reward(images, prompts, metadata) -> scores [B]`.
        needs_gradient: the reward must be differentiable.

    Raises:
        ConfigError, rewards.RewardError: one line for a mistake in the configuration.
    """

    def __init__(self, config: ConfigDict, model: Model | None = None, reward=None, needs_gradient=False):
        # accelerate starts several processes on a CPU only when told that it is one.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu, timeout=timedelta(minutes=config.timeout_minutes))
        self.config = c = resolve(config, state.num_processes)
        if c.mixed_precision == "fp16" and state.device.type == "cpu":
            raise ConfigError("mixed_precision = 'fp16' needs a GPU; on a CPU use 'no' or 'bf16'")
        log_with = parse_log_with(c.log_with)
        parse_spec(c.reward_fn)
        self.eval_prompts = load_prompts(c.eval_prompt_fn, "eval_prompt_fn")
        self.checkpoint = None
        if c.resume_from:
            self.checkpoint = on_main(lambda: find_checkpoint(c.resume_from, c.log_dir, run_name=c.run_name))
        self.folder = on_main(self._choose_folder)
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=c.mixed_precision,
            gradient_accumulation_steps=c.train.get("gradient_accumulation_steps", 1),
            log_with=log_with,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder)),
        )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = c.allow_tf32

        self.reward = as_reward(reward) if reward else self._build_reward(c.reward_fn)
        if needs_gradient:
            require_differentiable(self.reward)
        self.extra_reward = self._build_extra_reward()
        self.model = (model or self._load_model()).to(self.accelerator.device)
        self.base = base_model(c.pretrained.model, self.model.denoiser)
        if self.checkpoint:
            check_base(self.checkpoint, self.base)
        if c.grad_checkpoint:
            self.model.enable_gradient_checkpointing()
        sampler = ddim_sampler(self.model.scheduler, c.num_inference_steps, c.eta)
        self.rollout = Rollout(self.model, sampler, c.guidance_scale, self.accelerator.autocast, c.adjoint_clip)
        self.evaluator = Evaluator(
            self.rollout, self.reward, self.extra_reward, self.eval_prompts, self.accelerator,
            num_images=c.num_eval_images, batch_size=c.per_gpu_capacity, seed=c.seed, keep=c.max_vis_images,
        )  # fmt: skip
        self.metrics = MetricsLog(self.folder / "metrics.jsonl")

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def open_folder(self, step: int) -> None:
        """Makes the run folder that of a run at optimizer step `step`, writes config.json and starts the trackers."""
        c = self.config
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(c, self.folder / "config.json")
            # A run that starts over drops also the evaluation of step 0.
            self.metrics.truncate_after(step or -1)
            clean_up(self.folder, step)
        start_trackers(self.accelerator, "alignprop", self.folder.name, self.folder, c.to_dict())
        self.accelerator.wait_for_everyone()

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        found = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(found, "sum"))

    def held_out_rewards(self) -> dict[int, float]:
        """Optimizer step -> held-out reward, where it was measured and finite."""
        rows = self.metrics.rows()
        return {r["step"]: r["reward"] for r in rows if r["kind"] == "eval" and r["reward"] is not None}

    def is_evaluated(self, step: int) -> bool:
        return on_main(lambda: any(r["kind"] == "eval" and r["step"] == step for r in self.metrics.rows()))

    def prune_checkpoints(self) -> None:
        """Keeps the newest, the best by held-out reward, and the one that this run continues from."""
        if self.is_main:
            keep = [self.checkpoint] if self.checkpoint else []
            prune(self.folder, self.config.num_checkpoint_limit, keep, self.held_out_rewards())

    def log(self, row: dict) -> None:
        """Appends a row to metrics.jsonl and sends its numbers to the trackers."""
        if self.is_main:
            self.metrics.append(row)
        log_row(self.accelerator, row)

    def say(self, text: str) -> None:
        """Prints once, whatever the number of processes, above the progress bars."""
        if self.is_main:
            tqdm.write(text)

    def report(self, evaluation: Evaluation, step: int, epoch: int) -> None:
        """Logs an evaluation during training, and draws the sample grid, before_after.png and curves.png.

        The row comes last: it says that the evaluation is done, and one that was interrupted is done again.
        """
        row = {**evaluation.row(), "step": step, "epoch": epoch}
        if self.is_main:
            samples, labels = self.folder / "samples", evaluation.labels()
            save_grid(evaluation.images, labels, samples / f"step_{step:06d}.png")
            log_images(self.accelerator, "samples", evaluation.images, labels, step)
            if step == 0:
                torch.save([evaluation.images, labels], samples / "before.pt")
            else:
                self._draw_before_after(evaluation.images, labels)
                plot_curves([*self.metrics.rows(), row], self.folder / "curves.png")
        self.log(row)
        self.say(f"step {step}: held-out " + ", ".join(f"{k} {v:.3f}" for k, v in row["rewards"].items()))

    def _draw_before_after(self, images: torch.Tensor, labels: list[str]) -> None:
        before = self.folder / "samples" / "before.pt"
        if not before.exists():
            return
        first, first_labels = torch.load(before, weights_only=True)
        pairs = list(zip(first_labels, labels, strict=False))
        # A resumed run may evaluate other prompts, or fewer; then there is nothing to set side by side.
        if first.shape == images.shape and all(prompt(a) == prompt(b) for a, b in pairs):
            both = [f"{a} → {b.splitlines()[-1]}" for a, b in pairs]
            save_before_after(first, images, both, self.folder / "before_after.png")

    def finish(self) -> None:
        """Ends the trackers and prints the rewards before and after, and where everything lies."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            evaluations = [row for row in self.metrics.rows() if row["kind"] == "eval"]
            if evaluations:
                first, last = evaluations[0], evaluations[-1]
                self.say(f"\nheld-out rewards, step {first['step']} → step {last['step']}:")
                for name in (name for name in first["rewards"] if name in last["rewards"]):
                    before, after = first["rewards"][name], last["rewards"][name]
                    self.say(f"  {name:32s} {_shown(before)} → {_shown(after)}")
            self.say(f"in {self.folder}: " + ", ".join(sorted(path.name for path in self.folder.iterdir())))
        self.accelerator.end_training()

    def _build_reward(self, spec: str) -> WeightedReward:
        c = self.config
        options = {name: c[name].to_dict() for name in ("aesthetic", "hps", "clip")}
        return build_reward(spec, options, self.accelerator.device)

    def _build_extra_reward(self) -> WeightedReward | None:
        """The rewards that are measured besides: those of `eval_reward_fn` that `reward` does not have."""
        named = parse_spec(self.config.eval_reward_fn) if self.config.eval_reward_fn else []
        extra = ",".join(name for name in named if name not in self.reward.terms)
        return self._build_reward(extra) if extra else None

    def _load_model(self) -> Model:
        c = self.config
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[c.mixed_precision]
        source = c.pretrained
        return load_model(
            source.model, revision=source.revision, config=source.config, dtype=dtype, full=not c.use_lora
        )

    def _choose_folder(self) -> Path:
        """log_dir/run_name; the checkpoint's own run where that has one and no other name is given."""
        c = self.config
        if self.checkpoint and not c.run_name and (own := run_folder_of(self.checkpoint)):
            return own
        name = c.run_name or f"{c.get('preset', c.task)}_{time.strftime('%Y%m%d_%H%M%S')}"
        folder = Path(c.log_dir) / name
        continued = self.checkpoint and run_folder_of(self.checkpoint) == folder.resolve()
        if c.task == "train" and not continued and checkpoints_of(folder):
            raise ConfigError(
                f"run_name = {c.run_name!r}: {str(folder)!r} already holds a run; choose another name, or continue it "
                f"with resume_from={str(folder)!r}"
            )
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(f"log_dir = {c.log_dir!r}: {str(existing)!r} is not a folder that can be written to")
        return folder


def on_main(function: Callable[[], Any]) -> Any:
    """`function()` of the main process, or its ConfigError, on every process.

    For what depends on the disk or the clock: processes that look for themselves may see different things.
    """
    state = PartialState()
    answer: list = [None, None]
    if state.is_main_process:
        try:
            answer[0] = function()
        except ConfigError as error:
            answer[1] = error
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1]:
        raise answer[1]
    return answer[0]


def prompt(label: str) -> str:
    """The prompt of a picture's caption, which `Evaluation.labels` put above its score."""
    return label.rpartition("\n")[0]


def _shown(value: float | None) -> str:
    return f"{float('nan') if value is None else value:8.3f}"
