"""The task that plans: what training will cost with each memory policy. It needs no GPU and no weights."""

import torch
from tqdm.auto import tqdm

from alignprop.memory.forecast import CONTEXT, GIB, MARGIN, Forecast, forecast
from alignprop.memory.gpus import GPUS, Gpu, measure
from alignprop.memory.planner import candidates, fastest_for, gpu_bytes, skeletons, table
from alignprop.models.loading import PRECISIONS
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.resolve import resolve
from alignprop.settings.sizes import picture_sizes, size_name
from rewards.errors import first_line


def compare_policies(config, gpu_memory: float | None = None, gpu: str | None = None) -> list[Forecast]:
    """Prints what training will cost with each memory policy, and the fastest that fits. Needs no GPU and no weights.

    Args:
        config: an unresolved configuration.
        gpu_memory: the memory of the GPU in GiB. None: that of `gpu`, or of the GPU in this machine, if it has one.
        gpu: the name of a GPU in memory/gpus.py, for which seconds are predicted. Without both, the pace of the GPU in
            this machine is measured first, if it has one.

    Raises:
        ConfigError, rewards.RewardError: the configuration has a mistake. The message is one line.
    """
    c = resolve(config, 1)
    named = GPUS[gpu] if gpu else None if gpu_memory else _measured(PRECISIONS[c.mixed_precision])
    gib = gpu_memory or (named.gib if named else None)
    size = gib * GIB if gib else gpu_bytes()
    build, found, done = skeletons(c), [], {}
    sizes = picture_sizes(c.resolution)
    largest = f", the largest pictures, {size_name(sizes[0])}" if len(sizes) > 1 else ""
    print(
        f"{c.pretrained.model}, {c.reward_fn}, {c.mixed_precision}, {c.train.num_inference_steps} steps{largest}",
        flush=True,
    )
    if c.pretrained.denoiser:
        precision = str(PRECISIONS[c.mixed_precision]).removeprefix("torch.")
        print(f"pretrained.denoiser counts as {precision}, or as pretrained.quantize: its file is not read here")
    names = tuple(POLICIES) if c.memory_policy == "auto" else (c.memory_policy,)
    progress = tqdm(candidates(c, 1, names), "planning", leave=False)
    for name, memory, capacity in progress:
        of_policy = [f for f in found if f.policy == name]
        if not size or not any(f.fits(size) for f in of_policy):
            found.append(forecast(build, c, name, memory, capacity, done))
            progress.set_postfix_str(f"{name}: {found[-1].peak / GIB:.2f} GiB")
    last = {f.policy: f for f in found}  # with a size, the first capacity that fits, or the smallest
    forecasts = list(last.values()) if size else found
    print(table(forecasts, c.train.total_batch_size, size, named))
    print(
        f"Not in these peaks: the CUDA context, about {CONTEXT / GIB:g} GiB, workspaces, up to {MARGIN:.0%}, and "
        "rewards of your own. 'fits' leaves room for the first two."
    )
    if not size:
        print(fastest_for(forecasts))
    fitting = [f for f in forecasts if size and f.fits(size)]
    if fitting:
        best = fitting[0]
        print(
            f"The fastest that fits {size / GIB:g} GiB: --config.memory_policy={best.policy} "
            f"--config.per_gpu_capacity={best.capacity}"
        )
    elif size:
        print(f"None fits {size / GIB:g} GiB.")
    return forecasts


def _measured(dtype: torch.dtype) -> Gpu | None:
    """Measures the GPU of this machine and says what was found; None without a GPU."""
    if (free := gpu_bytes()) is None:
        return None
    try:
        found = measure(torch.device("cuda"), free / GIB, dtype)
    except RuntimeError as error:  # among them that the GPU is full
        print(f"This GPU's pace could not be measured ({first_line(error)}), so no seconds are predicted")
        return None
    print(
        f"This GPU, measured: {found.flops / 1e12:.0f} TFLOP/s in {str(dtype).removeprefix('torch.')}, "
        f"{found.bus / 1e9:.0f} GB/s from the host"
    )
    return found
