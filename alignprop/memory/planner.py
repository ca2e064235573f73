"""Chooses a memory policy by forecasts of its cost, from a loaded model or from its configuration files alone."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from ml_collections import ConfigDict

from alignprop.evaluation.judges import Judges, build_judges
from alignprop.memory.accounting import on_meta
from alignprop.memory.forecast import CONTEXT, GIB, Forecast, forecast
from alignprop.memory.gpus import Gpu, seconds_per_sample
from alignprop.memory.quantize import quantize
from alignprop.memory.simulation import Build
from alignprop.models.base import Model
from alignprop.models.configs import find_config, find_tower_config
from alignprop.models.loading import PRECISIONS, SINGLE_FILE
from alignprop.models.skeleton import skeleton
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES, MemoryPolicy
from alignprop.settings.options import components_left_out
from rewards import WeightedReward
from rewards.skeleton import skeleton_reward, without_custom
from rewards.towers import ClipTower


class Choice(NamedTuple):
    """A memory policy and the size of a micro-batch.

    Attributes:
        policy: the name of the policy.
        memory: the values of the policy, replaced by those that the configuration's `memory` sets.
        capacity: the number of samples in a micro-batch of one process.
    """

    policy: str
    memory: MemoryPolicy
    capacity: int


def skeletons(config: ConfigDict) -> Build:
    """Returns a function that builds the configured model and its judges from their configuration files alone.

    Raises:
        ConfigError, rewards.RewardError: the files are not found.
    """
    source, is_file = config.pretrained, config.pretrained.model.endswith(SINGLE_FILE)
    if is_file and not source.config:
        raise ConfigError(f"pretrained.model = {source.model!r} is a single file: to plan, pretrained.config is needed")
    facts = find_config(source.config) if is_file else find_config(source.model, source.revision)

    def build() -> tuple[Model, Judges]:
        model = skeleton(
            facts,
            PRECISIONS[config.mixed_precision],
            components_left_out(config),
            resolution=config.resolution,
            true_cfg_scale=config.true_cfg_scale,
        )
        if not config.use_lora:
            model.denoiser.float()
        judges = build_judges(config, None, build=_skeleton_reward, build_tower=_skeleton_tower)
        quantize(model, judges, config)
        return model, judges

    return build


def _skeleton_reward(spec: str, options: Mapping[str, Mapping]) -> WeightedReward:
    return skeleton_reward(spec, options, _tower_config)


def _skeleton_tower(config: ConfigDict) -> ClipTower:
    """Builds the image tower of `clip.model`, as the tower of an aesthetic reward that uses this CLIP."""
    options = config.aesthetic.to_dict() | {"clip": config.clip.model, "dtype": config.clip.dtype}
    reward = skeleton_reward(
        "aesthetic", {"aesthetic": options}, lambda name, field, family: _tower_config(name, "clip.model", family)
    )
    return reward.terms["aesthetic"].tower


def _tower_config(name: str, field: str, family: str | tuple[str, ...]) -> dict:
    return {k: v for k, v in find_tower_config(name, field, family)["model"].items() if k != "_class_name"}


def candidates(config: ConfigDict, num_processes: int, names=tuple(POLICIES)) -> list[Choice]:
    """Lists the choices with the named policies, from the fastest to the most frugal.

    If `per_gpu_capacity` is "auto", each policy comes with several capacities. All choices have the values that the
    configuration's `memory` sets.
    """
    share = max(config.train.total_batch_size // num_processes, 1)
    capacities = [config.per_gpu_capacity]
    if config.per_gpu_capacity == "auto":
        capacities = [n for n in (16, 8, 4, 2, 1) if share % n == 0]
    choices = []
    for name in names:
        values = {k: v for k, v in config.memory.to_dict().items() if v is not None}
        memory = MemoryPolicy(**{**vars(POLICIES[name]), **values})
        trains_all = config.task == "train" and not config.use_lora
        if memory.residency != "all" and (memory.keep_steps or trains_all):
            continue
        if memory.residency == "stream" and config.compile:
            continue
        # With few samples per call a GPU loses more time than kept graphs save.
        few = 4 if name == "roomy" and len(capacities) > 1 else 1
        choices += [Choice(name, memory, n) for n in capacities if n >= few]
    return choices


def choose_policy(config: ConfigDict, model: Model, judges: Judges, accelerator: Accelerator, say) -> Choice:
    """Chooses what a run begins with, as far as its configuration says "auto".

    On a GPU this is the fastest choice that fits by its forecast, or the most frugal choice if none fits. Without a GPU
    there is no limit to plan for.

    Args:
        config: the resolved configuration.
        model, judges: the networks with their weights, on the host.
        accelerator: gives the device and the processes.
        say: called with each message about the planning.
    """
    c, on_gpu = config, accelerator.device.type == "cuda"
    names = tuple(POLICIES) if c.memory_policy == "auto" else (c.memory_policy,)
    if accelerator.distributed_type == DistributedType.FSDP and c.memory_policy == "auto":
        names = ("balanced",)  # the planner cannot forecast the memory of spread weights
    elif c.memory_policy == "auto" and (not on_gpu or c.task != "train"):
        names = ("fast",)  # sampling alone needs little
    choices = candidates(c, accelerator.num_processes, names)
    if not on_gpu or len(choices) == 1 or c.task != "train":
        return next((choice for choice in choices if choice.capacity <= 4), choices[0])
    size, forecasts = gpu_bytes(), []
    say(f"planning for {size / GIB:.1f} GiB")
    counted = replace(judges, reward=without_custom(judges.reward), extra=judges.extra and without_custom(judges.extra))
    done: dict = {}
    try:
        for choice in choices:
            forecasts.append(forecast(lambda: (on_meta(model), on_meta(counted)), c, *choice, done))
            if forecasts[-1].fits(size):
                break
    except ConfigError:  # the estimator does not fit the sampler
        raise
    except Exception as error:  # a model may do what only real tensors can, which must not end the run
        choice = next((choice for choice in choices if choice.policy == "balanced"), choices[-1])
        say(
            f"the memory of this model could not be forecast ({type(error).__name__}: {error}); "
            f"starting with {choice.policy!r}"
        )
        return choice
    say(table(forecasts, c.train.total_batch_size, size))
    return choice


def next_choice(config: ConfigDict, num_processes: int, choice: Choice, reason: str) -> Choice:
    """Returns the next choice after one that did not fit: a smaller capacity or a more frugal memory policy.

    Args:
        config: the resolved configuration.
        num_processes: the number of processes.
        choice: the choice that did not fit.
        reason: the error with which it failed.

    Raises:
        ConfigError: no choice is left. The message has the reason.
    """
    names = tuple(POLICIES) if config.memory_policy == "auto" else (choice.policy,)
    choices = candidates(config, num_processes, names)
    tried = [(other.policy, other.capacity) for other in choices].index((choice.policy, choice.capacity))
    # Layers that were made lean cannot be changed back.
    rest = [other for other in choices[tried + 1 :] if other.memory.lean >= choice.memory.lean]
    if not rest:
        raise ConfigError(
            f"memory_policy = {choice.policy!r}, per_gpu_capacity = {choice.capacity} does not fit: {reason}"
        )
    return rest[0]


def table(forecasts: list[Forecast], total_batch_size: int, size: float | None, gpu: Gpu | None = None) -> str:
    """Returns a table with one line per forecast.

    Args:
        forecasts: the forecasts.
        total_batch_size: the samples of an optimizer step.
        size: the bytes of a GPU. If given, each line says whether the forecast fits.
        gpu: a GPU for which the seconds are predicted.
    """
    head = f"{'policy':10} {'capacity':>8} {'peak GiB':>9}  {'where':8} {'TFLOP/sample':>12} {'TFLOP/step':>12}"
    lines = [f"{head} {'GiB moved/sample':>16}" + (f" {'s/sample':>9}" if gpu else "")]
    for f in forecasts:
        fits = "" if size is None else "  fits" if f.fits(size) else "  does not fit"
        cost = f"{f.flops / 1e12:12.4g} {f.flops * total_batch_size / 1e12:12.4g} {(f.moved + f.streamed) / GIB:16.4g}"
        seconds = f" {seconds_per_sample(f, gpu):9.3g}" if gpu else ""
        lines.append(f"{f.policy:10} {f.capacity:8} {f.peak / GIB:9.2f}  {f.phase:8} {cost}{seconds}{fits}")
    return "\n".join(lines)


def fastest_for(forecasts: list[Forecast], gibs: Iterable[float] = (8, 12, 16, 24, 48, 80)) -> str:
    """Returns a line that names, for GPUs of some sizes in GiB, the first of the forecasts that fits."""
    found = []
    for gib in gibs:
        best = next((f for f in forecasts if f.fits(gib * GIB)), None)
        capacity = f" with {best.capacity}" if best and len({f.capacity for f in forecasts}) > 1 else ""
        found.append(f"{gib:g}: {best.policy}{capacity}" if best else f"{gib:g}: none")
    return "The fastest by the GiB of a GPU: " + ", ".join(found)


def gpu_bytes() -> int | None:
    """Returns the bytes of this process's GPU that no other process uses; None without a GPU."""
    return torch.cuda.mem_get_info()[0] + CONTEXT if torch.cuda.is_available() else None
