"""How a run ends before its time: asked to (preemptible machines send SIGTERM, people press Ctrl-C), or forced to.

Exit status 0: done. 1: an error, told in one line. 75: stopped when asked, saved; the same command goes on.
130: Ctrl-C where there was nothing to save, or twice.
"""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager

from alignprop.settings.errors import ConfigError
from rewards.errors import UserError

STOPPED = 75
"""Exit status of a run that stopped when asked and saved: EX_TEMPFAIL, "run me again"."""

_AGAIN = 3.0  # seconds; launchers repeat what a terminal already sent to every process


@contextmanager
def stop_requests():
    """Within it SIGTERM and SIGINT only note that they came, in the list that it yields.

    Ctrl-C once more, some seconds later, raises KeyboardInterrupt as usual. Outside of the main thread, where Python
    has no signals, the list stays empty.
    """
    requests: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    first = 0.0

    def note(number, frame):
        nonlocal first
        if not requests:
            first = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # Not print: the signal may have come in the middle of another one.
                os.write(2, b"\nasked to stop: saving after this step; Ctrl-C again ends at once, unsaved\n")
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
    """Whether it is torch's error of that kind; torch is not imported to find out, since only torch raises it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _end(number, frame) -> None:
    """Ends a process that nobody has asked to save: by an exception, which whoever has something open is told by.

    While a module is being imported it ends at once: libraries catch what is raised then, and go on half-imported.
    """
    if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in traceback.walk_stack(frame)):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(STOPPED if number == signal.SIGTERM else 130)
    if number == signal.SIGTERM:
        sys.exit(STOPPED)
    raise KeyboardInterrupt


@contextmanager
def plain_endings():
    """Within it a person's mistake, Ctrl-C, a full disk and the death of another process end this one with one line
    instead of a traceback."""
    rank = os.environ.get("RANK", "0")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)  # there is nothing to save yet
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    except UserError as error:
        # A mistake in the configuration is every process's; told once a machine. What has a cause may be one's own.
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
                f"error: process {rank}: {str(error).splitlines()[0].split('. ')[0]}; a more frugal memory_policy or a "
                "smaller per_gpu_capacity needs less: the same command with --plan shows how much"
            )
        if not any(sign in str(error) for sign in _LOST):
            raise
        reason = str(error).strip().splitlines()[0]
        sys.exit(
            f"error: process {rank} lost contact with another one, whose own message tells why "
            f"({reason}); go on from the newest checkpoint with --config.resume_from=latest"
        )
