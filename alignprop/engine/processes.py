"""Processes that agree."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from alignprop.settings.errors import ConfigError


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
