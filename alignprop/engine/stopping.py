"""How a run ends early: because it is asked to stop, or because of an error.

Preemptible machines send SIGTERM, and people press Ctrl-C. The exit status of a process is

0: the run is done.
1: an error, which the process reports in one line.
75: the run was asked to stop and has saved, if there was anything to save. The same command with `resume_from` goes on.
130: Ctrl-C, either twice or when there was nothing to save.
"""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from alignprop.settings.errors import ConfigError
from rewards.errors import UserError, first_line

STOPPED = 75
"""The exit status of a run that was asked to stop and has saved: EX_TEMPFAIL, "run me again"."""

_AGAIN = 3.0  # seconds; within them a second signal may be a launcher's repetition of the first


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collects SIGTERM and SIGINT in the list that it yields, instead of ending the process, within a `with` block.

    Another Ctrl-C, more than `_AGAIN` seconds after the first signal, raises KeyboardInterrupt as usual. Only the main
    thread can handle signals in Python; in any other thread the list stays empty.
    """
    requests: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not requests:
            first = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # Not print, because the signal may have interrupted another print.
                os.write(
                    2, b"\nasked to stop: saving after this step; Ctrl-C again ends the run at once, without saving\n"
                )
        elif number == signal.SIGINT and time.monotonic() - first > _AGAIN:
            raise KeyboardInterrupt
        requests.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether it is torch's out-of-memory error. If torch is not imported, it cannot be."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _end(number: int, frame: FrameType | None) -> None:
    """Handles a signal that comes when there is nothing to save: ends the process.

    It raises an exception, so that code with open files or connections can close them. During an import it ends the
    process at once, because libraries catch an exception then and go on half-imported.
    """
    if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in traceback.walk_stack(frame)):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(STOPPED if number == signal.SIGTERM else 130)
    if number == signal.SIGTERM:
        sys.exit(STOPPED)
    raise KeyboardInterrupt


@contextmanager
def plain_endings() -> Iterator[None]:
    """Turns expected errors within a `with` block into an exit with one line instead of a traceback.

    These are a mistake of the user, Ctrl-C, a full disk, a missing permission, too little GPU memory, and the death of
    another process.
    """
    rank = os.environ.get("RANK", "0")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)  # there is nothing to save yet
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    except UserError as error:
        # All processes find the same mistake in the configuration, so only one of each machine reports it. An error
        # with a cause may be that of a single process.
        is_shared = isinstance(error, ConfigError) and not error.__cause__
        sys.exit(1 if is_shared and os.environ.get("LOCAL_RANK", "0") != "0" else f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except PermissionError as error:
        sys.exit(f"error: {str(error.filename)!r}: {error.strerror}")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f" {str(error.filename)!r}" if error.filename else ""
        sys.exit(
            f"error: cannot write{where}: {error.strerror}; checkpoints are untouched: make room and go on from the "
            "newest with --config.resume_from=latest"
        )
    except RuntimeError as error:
        if _is_out_of_memory(error):
            sys.exit(
                f"error: process {rank}: {first_line(error).split('. ')[0]}; a more frugal memory_policy or a "
                "smaller per_gpu_capacity needs less: the same command with --plan shows how much"
            )
        if not any(sign in str(error) for sign in _LOST):
            raise
        reason = first_line(error)
        sys.exit(
            f"error: process {rank} lost contact with another process, whose own message says why "
            f"({reason}); go on from the newest checkpoint with --config.resume_from=latest"
        )
