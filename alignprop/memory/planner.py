"""Which memory policy to train with: forecasts of each, from a model that is loaded or from its configuration alone."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from ml_collections import ConfigDict

from alignprop.memory.accounting import on_meta
from alignprop.memory.forecast import CONTEXT, GIB, Forecast, Parts, forecast
from alignprop.models.base import Model
from alignprop.models.configs import find_config, find_tower_config
from alignprop.models.loading import SINGLE_FILE
from alignprop.models.skeleton import skeleton
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES, MemoryPolicy
from alignprop.settings.resolve import components_left_out
from rewards import REWARDS, WeightedReward
from rewards.skeleton import skeleton_reward, without_custom


def skeletons(config: ConfigDict) -> Parts:
    """The configured model and reward, from their configuration files alone.

    Raises:
        ConfigError, rewards.RewardError: they are not to be found.
    """
    source, is_file = config.pretrained, config.pretrained.model.endswith(SINGLE_FILE)
    if is_file and not source.config:
        raise ConfigError(f"pretrained.model = {source.model!r} is a single file: to plan, pretrained.config is needed")
    facts = find_config(source.config) if is_file else find_config(source.model, source.revision)
    half = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    options = {name: config[name].to_dict() for name in REWARDS if name in config}

    def tower_config(name: str, field: str, family: str) -> dict:
        return {k: v for k, v in find_tower_config(name, field, family)["model"].items() if k != "_class_name"}

    def parts() -> tuple[Model, WeightedReward]:
        model = skeleton(
            facts, half, components_left_out(config), resolution=config.resolution, true_cfg_scale=config.true_cfg_scale
        )
        if not config.use_lora:
            model.denoiser.float()
        return model, skeleton_reward(config.reward_fn, options, tower_config)

    return parts


def candidates(config: ConfigDict, num_processes: int, names=tuple(POLICIES)) -> list[tuple[str, MemoryPolicy, int]]:
    """(policy, its values, capacity) of the named policies, from the fastest to the most frugal.

    Where `per_gpu_capacity` is "auto", with several capacities each; what `memory` sets is in all of them.
    """
    share = max(config.train.total_batch_size // num_processes, 1)
    capacities = [config.per_gpu_capacity]
    if config.per_gpu_capacity == "auto":
        capacities = [n for n in (16, 8, 4, 2, 1) if share % n == 0]
    found = []
    for name in names:
        values = {k: v for k, v in config.memory.to_dict().items() if v is not None}
        memory = MemoryPolicy(**{**vars(POLICIES[name]), **values})
        trains_all = config.task == "train" and not config.use_lora
        if memory.residency == "phase" and (memory.keep_steps or trains_all):
            continue
        # A GPU that is called with few samples at a time loses more than kept graphs save.
        few = 4 if name == "roomy" and len(capacities) > 1 else 1
        found += [(name, memory, n) for n in capacities if n >= few]
    return found


def choose_policy(config: ConfigDict, model: Model, reward, accelerator: Accelerator, say) -> tuple[str, int]:
    """The memory policy and the capacity that a run should begin with, where its configuration says "auto".

    On a GPU the fastest that fits, by forecast; without one there is no limit to plan for.

    Args:
        config: resolved.
        model, reward: with their weights, on the host.
        say: told of the choice.
    """
    c, processes = config, accelerator.num_processes
    names = tuple(POLICIES) if c.memory_policy == "auto" else (c.memory_policy,)
    size = gpu_bytes() if accelerator.device.type == "cuda" else None
    if accelerator.distributed_type == DistributedType.FSDP and c.memory_policy == "auto":
        names = ("balanced",)  # what spread weights need is not planned
    elif size is None and c.memory_policy == "auto":
        names = ("fast",)
    elif c.task != "train" and c.memory_policy == "auto":
        names = ("fast",)  # sampling alone needs little
    options = candidates(c, processes, names)
    if size is None or len(options) == 1 or c.task != "train":
        name, _, capacity = next((option for option in options if option[2] <= 4), options[0])
        return name, capacity
    say(f"planning for {size / GIB:.1f} GiB")
    counted = without_custom(reward)
    parts, found, done = (lambda: (on_meta(model), on_meta(counted))), [], {}
    try:
        for name, memory, capacity in options:
            found.append(forecast(parts, c, name, memory, capacity, done))
            if found[-1].fits(size):
                break
    except Exception as error:  # a model may do what only real tensors can; that must not cost anyone the run
        name, _, capacity = next((option for option in options if option[0] == "balanced"), options[-1])
        say(f"the model could not be planned ({type(error).__name__}: {error}); beginning with {name!r}")
        return name, capacity
    say(table(found, c.train.total_batch_size, size))
    return found[-1].policy, found[-1].capacity


def table(forecasts: list[Forecast], total_batch_size: int, gpu: float | None) -> str:
    """A line per forecast, with "fits" where it does in `gpu` bytes."""
    lines = [f"{'policy':10} {'capacity':>8} {'peak GiB':>9}  {'where':8} {'TFLOP/sample':>12} {'TFLOP/step':>12}"]
    for f in forecasts:
        fits = "" if gpu is None else "  fits" if f.fits(gpu) else "  does not fit"
        cost = f"{f.flops / 1e12:12.4g} {f.flops * total_batch_size / 1e12:12.4g}"
        lines.append(f"{f.policy:10} {f.capacity:8} {f.peak / GIB:9.2f}  {f.phase:8} {cost}{fits}")
    return "\n".join(lines)


def gpu_bytes() -> int | None:
    """Of the GPU that is there, as far as nobody else uses them; None without one."""
    return torch.cuda.mem_get_info()[0] + CONTEXT if torch.cuda.is_available() else None
