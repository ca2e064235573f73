"""The processes of a run: how they start, and what they agree on."""

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
        timeout_minutes: the longest wait for another process.
    """
    return PartialState(cpu=_on_cpu(), timeout=timedelta(minutes=timeout_minutes))


def make_accelerator(mixed_precision: str, log_with: list, folder: Path) -> Accelerator:
    """The accelerator of a run whose results lie in `folder`."""
    return Accelerator(
        cpu=_on_cpu(),
        mixed_precision=mixed_precision,
        # The trainer sums micro-batches itself; without this, the environment could have accelerate divide losses.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=log_with,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )


def _on_cpu() -> bool:
    """Whether the run is on CPUs: accelerate starts several processes there only when told so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


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
