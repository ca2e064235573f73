"""The runs of a bake-off: which runs there are, what each still needs, and their processes.

A run is a method, a reward and a seed. It has its own run folder, which holds all of its state.
"""

import ctypes
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from alignprop.engine.stopping import STOPPED
from alignprop.method.estimators import ESTIMATORS
from alignprop.runs.tracking import MetricsLog
from scripts.bakeoff.curves import curve

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = [*ESTIMATORS, "ddpo"]
REWARDS = {"aesthetic_clip": "aesthetic:1,clip:40", "jpeg": "jpeg_proxy"}
MEASURED = "aesthetic,clip,rewards.tiny_judge:rating,rewards.tiny_judge:obedience,jpeg_compressibility"
FIELDS = {  # eta is 1 for all: DDPO needs a sampler with noise, and held-out rewards depend on the sampler
    "eta": 1.0, "eval_reward_fn": MEASURED, "num_eval_images": 24, "num_eval_prompts": 12, "num_inference_steps": 20,
    "max_vis_images": 8, "save_freq": 1, "num_checkpoint_limit": 1,
}  # fmt: skip
DDPO_EVAL_FREQ = 3  # epochs


@dataclass(frozen=True)
class Budget:
    """The budget that every run's evaluations have to cover.

    Attributes:
        samples: The pictures that training made.
        seconds: The processor seconds of training, without evaluations.
        ddpo_samples: The pictures for DDPO, which uses this instead of `samples` if `samples` is less.
        epoch: The samples between two evaluations. DDPO has DDPO_EVAL_FREQ times as many.
    """

    samples: int = 128
    seconds: float = 40.0
    ddpo_samples: int = 1600
    epoch: int = 64

    def samples_of(self, method: str) -> int:
        return max(self.samples, self.ddpo_samples) if method == "ddpo" else self.samples


@dataclass(frozen=True)
class BakeRun:
    """A run of a method on a reward with a seed, in the run folder `name`."""

    method: str
    reward: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.reward}-{self.seed}"

    def flags(self, folder: Path, epoch: int, epochs: int) -> list[str]:
        """Returns main.py's flags for `epochs` epochs of `epoch` samples in all, continued from the run folder."""
        preset = "config/ddpo.py:tiny" if self.method == "ddpo" else "config/align_prop.py:quickstart"
        own = {"eval_freq": DDPO_EVAL_FREQ} if self.method == "ddpo" else {"estimator": self.method}
        place = {"log_dir": folder.resolve(), "run_name": self.name, "resume_from": "latest"}
        length = {"train.total_samples_per_epoch": epoch, "num_epochs": epochs}
        fields = {**FIELDS, **own, **place, **length, "reward_fn": REWARDS[self.reward], "seed": self.seed}
        return [f"--config={preset}", *(f"--config.{field}={value}" for field, value in fields.items())]


def runs_of(methods: list[str], rewards: list[str], seeds: int) -> list[BakeRun]:
    """Returns the runs, seed by seed, and for each seed method by method.

    So a bake-off that is stopped has compared all methods, and a machine that is busy for a while slows all methods.
    """
    return [BakeRun(m, r, seed) for seed in range(seeds) for m in methods for r in rewards]


class Bakeoff:
    """Some runs in one folder, as they are on the disk.

    Args:
        folder: The folder that holds the run folders.
        more: Further flags of main.py.
    """

    def __init__(self, folder: Path, runs: list[BakeRun], budget: Budget, more: list[str]):
        self.folder, self.runs, self.budget, self.more = folder, runs, budget, more
        self.curves = {run: self.read(run) for run in runs}

    def read(self, run: BakeRun) -> list[dict]:
        return curve(MetricsLog(self.folder / run.name / "metrics.jsonl").rows())

    def is_covered(self, run: BakeRun) -> bool:
        last = self.curves[run][-1:]
        return any(
            p["samples"] >= self.budget.samples_of(run.method) and p["seconds"] >= self.budget.seconds for p in last
        )

    def epoch_seconds(self, run: BakeRun) -> float | None:
        """Returns an epoch's seconds, measured by the run, or else by the method's other seeds. None if unknown."""
        mates = [other for other in self.runs if (other.method, other.reward) == (run.method, run.reward)]
        for measured in ([run], mates):
            ends = [self.curves[r][-1] for r in measured if self.curves[r] and self.curves[r][-1]["samples"]]
            if ends:
                return self.budget.epoch * sum(p["seconds"] for p in ends) / sum(p["samples"] for p in ends)
        return None

    def epochs(self, run: BakeRun) -> int:
        """Returns how many epochs the run will have in all, estimated from what is known if it is not yet covered."""
        if self.is_covered(run):
            return self.curves[run][-1]["samples"] // self.budget.epoch
        epochs = math.ceil(self.budget.samples_of(run.method) / self.budget.epoch)
        if known := self.epoch_seconds(run):
            epochs = max(epochs, math.ceil(self.budget.seconds / known))
        return epochs

    def work(self) -> tuple[float, float]:
        """Returns the seconds of training: those done, and the estimate of all."""
        known = [seconds for run in self.runs if (seconds := self.epoch_seconds(run))]
        typical = sum(known) / len(known) if known else 1.0
        done = sum(points[-1]["seconds"] for points in self.curves.values() if points)
        total = sum(self.epochs(run) * (self.epoch_seconds(run) or typical) for run in self.runs)
        return done, max(total, done)

    def is_held(self, run: BakeRun) -> bool:
        """Returns whether a process, left behind by an earlier bake-off, trains in the run's folder and will save."""
        lock = self.folder / run.name / ".lock"
        if not lock.exists():
            return False
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def command(self, run: BakeRun) -> list[str]:
        return [sys.executable, "main.py", *run.flags(self.folder, self.budget.epoch, self.epochs(run)), *self.more]

    def start(self, run: BakeRun) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        with open(self.log(run), "a") as log:
            return subprocess.Popen(
                self.command(run), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_ends_too,
            )  # fmt: skip

    def log(self, run: BakeRun) -> Path:
        return self.folder / f"{run.name}.log"

    def finish(self, run: BakeRun, started: float, known: int, status: int) -> str:
        """Records what the process did. Returns what went wrong in one line, or an empty text.

        Args:
            started: When the process started, in seconds since the Unix epoch.
            known: How many points the run had then.
            status: The exit status of the process.
        """
        row = {"run": run.name, "started": started, "seconds": time.time() - started, "exit_status": status}
        MetricsLog(self.folder / "processes.jsonl").append(row)
        self.curves[run] = self.read(run)
        if status in (STOPPED, -signal.SIGTERM) or (status == 0 and len(self.curves[run]) > known):
            return ""
        if status == 0:
            return f"{run.name}: ended without a further evaluation (see {self.log(run)})"
        told = [line for line in self.log(run).read_text().splitlines() if line.strip()]
        reason = next((line for line in reversed(told) if line.startswith("error:")), told[-1] if told else "")
        return f"{run.name}: exit status {status}: {reason.removeprefix('error: ')} (see {self.log(run)})"

    def run(self, jobs: int) -> list[str]:
        """Runs everything that is not covered yet, with `jobs` processes at once. Returns a line for each failure.

        Raises:
            KeyboardInterrupt: The user pressed Ctrl-C. The processes have saved and ended.
        """
        waiting, active, failed = deque(run for run in self.runs if not self.is_covered(run)), {}, []
        done, total = self.work()
        shown = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} to go{postfix}"
        with tqdm(total=total, initial=done, desc="bake-off", smoothing=0, mininterval=2, bar_format=shown) as bar:
            try:
                while waiting or active:
                    free = (run for run in list(waiting) if not self.is_held(run))
                    while len(active) < jobs and (run := next(free, None)):
                        waiting.remove(run)
                        active[run] = self.start(run), time.time(), len(self.curves[run])
                        bar.set_postfix_str(" ".join(other.name for other in active))
                    time.sleep(0.5)
                    for run in [run for run in active if active[run][0].poll() is not None]:
                        process, *began = active.pop(run)
                        if problem := self.finish(run, *began, process.returncode):
                            failed.append(problem)
                            tqdm.write(f"failed: {problem}")
                        elif not self.is_covered(run):
                            waiting.appendleft(run)
                    self.curves.update({run: self.read(run) for run in active})
                    done, bar.total = self.work()
                    bar.update(done - bar.n)
            finally:
                for process, *_ in active.values():
                    process.terminate()
                for run, (process, *began) in active.items():
                    self.finish(run, *began, process.wait())
        return failed


def _ends_too() -> None:
    """Asks the system to stop this process when its parent dies, if the system can do that (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGTERM)
