"""The processes of a run: how they start, and how they agree on a result."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)

from alignprop.settings.errors import ConfigError


def start_processes(timeout_minutes: float) -> PartialState:
    """Joins the other processes, if a launcher has started several.

    Args:
        timeout_minutes: the longest time to wait for another process.
    """
    return PartialState(cpu=_on_cpu(), timeout=timedelta(minutes=timeout_minutes))


def make_accelerator(mixed_precision: str, log_with: list, folder: Path) -> Accelerator:
    """Returns the accelerator of a run with its results in `folder`."""
    return Accelerator(
        cpu=_on_cpu(),
        mixed_precision=mixed_precision,
        # The trainer sums micro-batches itself. Without this, the environment could make accelerate divide the losses.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=log_with,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )


def _on_cpu() -> bool:
    """Returns whether the run is on CPUs. accelerate uses several processes there only if it is told so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def on_main(function: Callable[[], Any]) -> Any:
    """Calls `function` on the main process, and returns its result, or raises its ConfigError, on every process.

    It is for functions that depend on the disk or the clock, because each process may see something different there.
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
