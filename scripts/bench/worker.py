"""Runs one side of a comparison in its own process, which makes an optimizer step each time it is asked to.

If two such processes are asked in turn, a busy machine slows both alike. The settings are JSON on the command line. A
line on standard input asks for a step, or to save. The process answers with one line of JSON on standard output, the
first time when everything is loaded. This file needs nothing but Python, because the two sides live in different
virtual environments.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
_SAVE = "save "


class WorkerError(Exception):
    """A worker ended without an answer. The text has the last lines that it wrote."""


class Worker:
    """The asking end: starts `python -m module settings` and waits until everything is loaded.

    Args:
        python: The interpreter of the worker's virtual environment.
        module: A module of the project that calls `serve`.
        settings: Anything that JSON can hold.

    Attributes:
        facts: The worker's first answer.
    """

    def __init__(self, python, module: str, settings: dict):
        self.module = module
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(
            [str(python), "-m", module, json.dumps(settings)], cwd=ROOT, env={**os.environ, **QUIET, **ONE_THREAD},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def step(self) -> dict:
        """Asks for one optimizer step and waits for it.

        Returns:
            "seconds" and "cpu_seconds" of the step, its mean "reward", and "peak_mib", the most memory that the process
            has held so far.
        """
        return self._ask("step")

    def save(self, folder) -> None:
        """Asks the worker to write what it has trained so far to `folder`, and waits until that is done."""
        self._ask(f"{_SAVE}{folder}")

    def _ask(self, request: str) -> dict:
        with suppress(BrokenPipeError):  # the worker has ended, so `_answer` raises the error
            print(request, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = "\n".join(self._errors.read().splitlines()[-15:])
            raise WorkerError(f"{self.module} ended with exit status {self._process.returncode}:\n{said}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()  # it has nothing to save
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):  # a question that was never read
                pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(build: Callable[[dict], tuple]) -> None:
    """The answering end. It does not return before standard input ends.

    Args:
        build: settings -> (a function that makes one optimizer step and returns its mean reward, further facts). If
            `Worker.save` is used, the tuple also has a function that writes what was trained to a folder.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries also print to standard output
    step, facts, *save = build(json.loads(sys.argv[1]))
    print(json.dumps({**facts, "peak_mib": peak_mib()}), file=answers)
    for request in iter(sys.stdin.readline, ""):
        answer = {}
        if request.startswith(_SAVE):
            save[0](request.rstrip("\n").removeprefix(_SAVE))
        else:
            answer = _timed(step)
        print(json.dumps(answer), file=answers)


def _timed(step: Callable[[], float]) -> dict:
    started, cpu_started = time.perf_counter(), time.process_time()
    reward = step()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "reward": reward, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Returns the most memory that this process has held so far, in MiB."""
    if sys.platform == "linux":  # its ru_maxrss begins at what the parent process held
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


# ---- what both sides do alike


def blueness(images):
    """Returns the reward: mean blue minus mean red of each picture, [B, 3, H, W] in [0, 1] -> [B] in [-1, 1]."""
    return images[:, 2].mean((1, 2)) - images[:, 0].mean((1, 2))


def noise_source(denoiser) -> Callable:
    """Returns a function of B that returns new initial latents [B, ...], in the same order on both sides."""
    import torch

    generator, size = torch.Generator().manual_seed(1), denoiser.config.sample_size
    return lambda count: torch.randn(count, denoiser.config.in_channels, size, size, generator=generator)


def start_lora(denoiser, rank: int) -> None:
    """Gives a fresh LoRA the same values on both sides. B stays zero."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(denoiser.named_parameters()):
            if "lora_A" in name:
                parameter.normal_(std=1 / rank, generator=generator)


def facts_of(denoiser) -> dict:
    """Returns the denoiser's sizes and attention, and the versions of the packages that it runs on."""
    count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    return {
        "parameters": count(denoiser.parameters()),
        "trained": count(p for p in denoiser.parameters() if p.requires_grad),
        "attention": ", ".join(sorted({type(p).__name__ for p in denoiser.attn_processors.values()})),
        "versions": {name: version(name) for name in PACKAGES},
    }
