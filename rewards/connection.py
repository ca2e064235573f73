"""The way to the process of a reward (process.py): starts it, asks it, and notices when it is gone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from rewards.errors import RewardError
from rewards.worker import Memory

TIMEOUT = 600.0  # seconds for an answer, also for the first one, which may wait for a download
PROGRAM = Path(__file__).resolve().with_name("worker.py")
# What a launcher tells the processes of a run. The program is none of them, and must not try to join them.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Died(RewardError):
    """The process of a reward has ended by itself."""


class Connection:
    """A process that runs worker.py, and the way to it. The process ends when this object or this process does.

    Args:
        name: The reward, for messages.
        python: The path of the interpreter, or the name of a program on PATH.
        options: What `Scorer.start` needs besides.

    Attributes:
        differentiable: Whether the reward says that it has a gradient.
        holds: The batch whose gradient can be asked for, or None.
    """

    def __init__(self, name: str, python: str, **options: Any):
        self.name, self.holds = name, None
        self._memory = Memory(_nameless_file())
        self._socket, theirs = socket.socketpair()
        descriptors = theirs.fileno(), self._memory.file.fileno()
        try:
            self._process = subprocess.Popen(
                [self._found(python), str(PROGRAM), *map(str, descriptors)], pass_fds=descriptors,
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
                env={name: value for name, value in os.environ.items() if name not in LAUNCHER},
            )  # fmt: skip
        except OSError as error:
            raise RewardError(f"reward {name!r}: {python!r} cannot be started: {error.strerror}") from error
        finally:
            theirs.close()
        self._answers = self._socket.makefile(encoding="utf-8")
        self._last_line: deque[str] = deque(maxlen=1)
        self._relay = threading.Thread(target=_relay, args=(self._process.stderr, self._last_line), daemon=True)
        self._relay.start()
        self._stop = weakref.finalize(self, _stop, self._socket, self._process)
        tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
        answer = self._ask("start", threads=torch.get_num_threads(), tf32=tf32, **options)
        self.differentiable = answer["differentiable"]

    def score(self, images: torch.Tensor, batch: dict[str, Any]) -> dict[str, Any]:
        self.holds = None
        self._memory.tensor(batch["shape"]).copy_(images)
        answer = self._ask("score", **batch)
        self.holds = batch
        return answer

    def backward(self, images: torch.Tensor, weights: list[float]) -> torch.Tensor:
        self.holds = None
        self._ask("backward", weights=weights)
        return torch.empty_like(images).copy_(self._memory.tensor(images.shape))

    def _found(self, python: str) -> str:
        if os.name == "nt":
            raise RewardError(f"reward {self.name!r}: a reward in a process of its own needs Linux or macOS")
        path = shutil.which(os.path.expanduser(python))
        if not path:
            raise RewardError(
                f"reward {self.name!r}: {python!r} is not an executable file; it must be the Python interpreter of an "
                "environment, perhaps with @cpu, @cuda or @cuda:N behind it"
            )
        return path

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer of a method of `Scorer`."""
        try:
            question = json.dumps({"method": method, **arguments})
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self.name!r}: its metadata must be plain values of JSON: {error}") from error
        try:
            self._socket.settimeout(TIMEOUT)
            self._socket.sendall((question + "\n").encode())
            line = self._answers.readline()
        except TimeoutError:
            self._process.kill()
            raise RewardError(f"reward {self.name!r}: its process has not answered in {TIMEOUT:g} s") from None
        except OSError:
            line = ""
        except BaseException:  # Ctrl-C: this answer must not be taken for that of another question
            self._process.kill()
            raise
        if not line.endswith("\n"):
            raise Died(self._death())
        answer = json.loads(line)
        if "error" not in answer:
            return answer
        verb = ":" if method == "start" else " failed:"
        kind = torch.OutOfMemoryError if answer["kind"] == "OutOfMemoryError" else RewardError
        raise kind(f"reward {self.name!r}{verb} {answer['error']}")

    def _death(self) -> str:
        self._stop()
        status = self._process.returncode
        how = f"{status} ({signal.strsignal(-status)})" if status < 0 else str(status)
        self._relay.join(timeout=5)
        last = f"; its last line was {self._last_line[0]!r}" if self._last_line else ""
        return f"reward {self.name!r}: its process ended with exit status {how}{last}"


def _nameless_file():
    """Returns a file that only its descriptor leads to: in memory, or where the system cannot do that, on the disk."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("pictures"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _relay(stream: TextIO, last_line: deque[str]) -> None:
    """Prints what the worker writes to its stderr, and keeps the last line."""
    with stream:
        for line in stream:
            if line.strip():
                last_line.append(line.strip())
            with suppress(ValueError):  # a stderr that is closed; the worker must not wait for a reader
                print(line, end="", file=sys.stderr)


def _stop(channel: socket.socket, process: subprocess.Popen) -> None:
    with suppress(OSError):  # the other end may be closed
        channel.shutdown(socket.SHUT_RDWR)
    channel.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
