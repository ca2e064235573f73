import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from alignprop.engine.stopping import plain_endings, stop_requests
from alignprop.settings.errors import ConfigError
from rewards.errors import RewardError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_does_not_interrupt(number, capfd):
    before = signal.getsignal(number)
    with stop_requests() as requests:
        assert not requests
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # launchers repeat it
        assert requests == [number.name] * 2
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("asked to stop") == 1


def test_ctrl_c_some_seconds_later_ends_at_once(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("alignprop.engine.stopping.time.monotonic", lambda: next(clock))
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_has_no_signals():
    seen = []

    def inside():
        with stop_requests() as requests:
            seen.append(requests)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [[]]


@pytest.mark.parametrize(("error", "code"), [
    (KeyboardInterrupt(), 130),
    (ConfigError("x = 1 must be 2"), "error: x = 1 must be 2"),
    (RewardError("reward 'x' failed"), "error: reward 'x' failed"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "error: process 0: CUDA out of memory; a more frugal"),
    (OSError(28, "No space left on device", "log"), "error: cannot write 'log': No space left on device; checkpoints"),
    (PermissionError(13, "Permission denied", "run"), "error: 'run': Permission denied"),
    (OSError(27, "File too large"), "error: cannot write: File too large; checkpoints"),
    (RuntimeError("[gloo/pair.cc] Connection closed by peer\nmore"), "error: process 0 lost contact .*by peer\\)"),
])  # fmt: skip
def test_endings_that_are_nobody_s_fault_are_one_line(error, code):
    with pytest.raises(SystemExit) as ended, plain_endings():
        raise error
    assert ended.value.code == code if isinstance(code, int) else re.match(code, ended.value.code)
    assert "\n" not in str(ended.value.code)


@pytest.mark.parametrize("error", [
    FileNotFoundError(2, "No such file"), RuntimeError("a bug"), type("RewardError", (ValueError,), {})("a namesake"),
    type("OutOfMemoryError", (RuntimeError,), {})("a namesake"),
])  # fmt: skip
def test_faults_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)), plain_endings():
        raise error


def test_a_mistake_is_told_once_a_machine_and_a_fault_by_every_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    ends = []
    for cause in (None, ValueError("mine")):
        with pytest.raises(SystemExit) as ended, plain_endings():
            raise ConfigError("x = 1 must be 2") from cause
        ends.append(ended.value.code)
    assert ends == [1, "error: x = 1 must be 2"]


def test_asked_to_stop_where_there_is_nothing_to_save(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, plain_endings():
        os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 75


HALF_IMPORTED = """
import pathlib, time
try:
    pathlib.Path("importing").touch()
    time.sleep(30)
except BaseException as error:  # as libraries do around what they can do without
    raise RecursionError("half of it is there") from error
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_asked_to_stop_while_a_library_is_imported_it_ends_at_once(tmp_path, number, status):
    (tmp_path / "library.py").write_text(HALF_IMPORTED)
    program = "from alignprop.engine.stopping import plain_endings\nwith plain_endings():\n    import library"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    words = [sys.executable, "-c", program]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "importing").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert (process.wait(timeout=20), process.stderr.read()) == (status, "interrupted\n")
