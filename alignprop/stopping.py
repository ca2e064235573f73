"""Being asked to stop: preemptible machines send SIGTERM, people press Ctrl-C."""

import os
import signal
import threading
import time
from contextlib import contextmanager

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
