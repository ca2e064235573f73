"""The records of a training run, for people and for resuming the run. Only the main process writes them.

<run>/
    config.json          the resolved configuration
    metrics.jsonl        a row per optimizer step and per evaluation
    report.html          whether the pictures got better, in words, curves and pictures (evaluation/report/)
    samples/             of every evaluation, a grid of the same prompts and noise, and the scores of all pictures
    before_after.png     the pictures of the first evaluation above those of the last
    curves.png           rewards and gradient norm
    checkpoints/         see runs/checkpoint.py
"""

import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from alignprop.engine.background import Background
from alignprop.evaluation.pictures import Pictures, plot_curves, save_before_after, save_grid
from alignprop.evaluation.report.page import write_page
from alignprop.evaluation.report.source import RunData, read_run
from alignprop.evaluation.report.verdict import Verdict, judge
from alignprop.evaluation.results import Evaluation, write_scores
from alignprop.evaluation.stop_when import MEASURES
from alignprop.runs.checkpoint import checkpoints_of, clean_up, prune, run_folder_of, step_of
from alignprop.runs.tracking import MetricsLog
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import save_config


class Records:
    """The folder of a training run, which one process at a time holds.

    An evaluation is reported in the background, while training goes on until its next row. That row is written after
    everything that was reported before it. Errors of the disk are raised then, or by `wait`.

    Args:
        folder: the run folder, which may not exist yet.
        config: the resolved configuration.
        started_from: the checkpoint that the run continues from, if any.
    """

    def __init__(self, folder: Path, config: ConfigDict, started_from: Path | None):
        self.folder, self.config, self.started_from = folder, config, started_from
        self._seen = checkpoints_of(folder)
        self._lock = FileLock(folder / ".lock")
        self._background = Background()
        self._verdict: Verdict | None = None

    def open(self, step: int, config: ConfigDict) -> None:
        """Brings the folder to the state of a run at optimizer step `step`, whatever the run was doing when it stopped.

        Args:
            step: the optimizer step that the run starts or continues from.
            config: the configuration to write to config.json.

        Raises:
            ConfigError: another process is training in the folder, or has trained in it since this process started;
                or metrics.jsonl is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        if checkpoints_of(self.folder) != self._seen:
            self.close()
            raise ConfigError(
                f"run_name = {self.folder.name!r}: while this process was loading, another one trained in "
                f"{str(self.folder)!r}; start again"
            )
        self.metrics = MetricsLog(self.folder / "metrics.jsonl")
        self.metrics.rows()  # This finds a damaged file before anything in the folder is changed.
        clean_up(self.folder, step)
        for file in (self.folder / "samples").glob("step_*.*"):
            number = file.stem.removeprefix("step_")
            if number.isdigit() and int(number) > step:
                file.unlink()
        # A run that starts from step 0 also drops an earlier evaluation of step 0.
        self.metrics.truncate_after(step or -1)
        save_config(config, self.folder / "config.json")

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Closes the folder. Behind the error that ends the run, errors of closing are left out."""
        with suppress(Exception) if error else nullcontext():
            self.close()

    def wait(self) -> None:
        """Returns when everything that was reported is in the folder."""
        self._background.wait()

    def close(self) -> None:
        """Releases the folder for other processes. The end of this process, for whatever reason, releases it too."""
        try:
            self.wait()
        finally:
            self._lock.release()

    def _hold(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"run_name = {self.folder.name!r}: another process is training in {str(self.folder)!r}; wait until "
                "it ends, or choose another run_name"
            ) from None
        except (OSError, NotImplementedError):  # Some network file systems have no locks.
            pass

    def append(self, row: dict) -> None:
        """Writes a row after everything that was reported before it, so that no later checkpoint is ahead of it."""
        self.wait()
        self.metrics.append(row)

    def report(self, evaluation: Evaluation, row: dict) -> None:
        """Writes an evaluation's pictures in the background, and last its row, which marks the evaluation as done."""
        self._background.submit(self._report, evaluation, row)

    def _report(self, evaluation: Evaluation, row: dict) -> None:
        self._draw(evaluation, row)
        self.metrics.append(row)
        self._verdict = self._report_on(write_page)

    def _report_on(self, function: Callable[[RunData], Verdict | None]) -> Verdict | None:
        """Returns what `function` says of the run. If it fails, it only warns, because a page must not cost the run."""
        try:
            steps = [step_of(checkpoint) for checkpoint in checkpoints_of(self.folder)]
            return function(read_run(self.folder, self.metrics.rows(), steps))
        except Exception as error:
            print(f"warning: there is no report of the run ({type(error).__name__}: {error})", file=sys.stderr)
            return None

    def is_evaluated(self, step: int) -> bool:
        return any(row["step"] == step for row in self.evaluations())

    def evaluations(self) -> list[dict]:
        """Returns the rows of all evaluations, oldest first."""
        self.wait()
        return [row for row in self.metrics.rows() if row["kind"] == "eval"]

    def prune_checkpoints(self, measure: Callable[[dict], float | None]) -> None:
        """Deletes old checkpoints, except for the newest, the best, and those that `resume_from` and the report name.

        This happens in the background, after the evaluation that may decide the best has been reported.

        Args:
            measure: returns the value that decides the best from an evaluation's row; None if the row does not have it.
        """
        self._background.submit(self._prune, measure)

    def _prune(self, measure: Callable[[dict], float | None]) -> None:
        measured = {row["step"]: measure(row) for row in self.metrics.rows() if row["kind"] == "eval"}
        held_out = {step: value for step, value in measured.items() if value is not None}
        # A checkpoint that `resume_from` names is kept (not the one of "latest"): the user may start from it once more.
        named = self.started_from and Path(self.config.resume_from).name in (self.started_from.name, "best")
        keep = [self.started_from] if named else []
        verdict = self._report_on(lambda run: judge(run.points, run.untrained))
        if verdict and verdict.turned is not None:  # the report recommends the last checkpoint before the turn
            keep += [path for path in checkpoints_of(self.folder) if step_of(path) <= verdict.best][-1:]
        prune(self.folder, self.config.num_checkpoint_limit, keep, held_out)

    def _draw(self, evaluation: Evaluation, row: dict) -> None:
        """Draws the sample grid and, after step 0, before_after.png and curves.png, which includes `row`."""
        samples, labels = self.folder / "samples", evaluation.labels()
        grid = samples / f"step_{row['step']:06d}.png"
        save_grid(evaluation.images, labels, grid)
        write_scores(evaluation, grid.with_suffix(".csv"))
        if row["step"] == 0:
            buffer = io.BytesIO()  # If torch wrote the file itself, its error would not say that the disk is full.
            torch.save([evaluation.images, labels], buffer)
            (samples / "before.pt").write_bytes(buffer.getvalue())
            return
        if (samples / "before.pt").exists():
            self._draw_before_after(evaluation.images, labels, samples / "before.pt")
        plot_curves([*self.metrics.rows(), row], self.folder / "curves.png")

    def _draw_before_after(self, images: Pictures, labels: list[str], before: Path) -> None:
        first, first_labels = torch.load(before, weights_only=True)
        pairs = list(zip(first_labels, labels, strict=False))
        # A resumed run may evaluate other prompts, or fewer. Then there is nothing to compare.
        same = [a.shape for a in first] == [b.shape for b in images]
        if same and all(prompt(a) == prompt(b) for a, b in pairs):
            both = [f"{a} → {b.split()[-1]}" for a, b in pairs]
            save_before_after(first, images, both, self.folder / "before_after.png")

    def summary(self) -> str:
        """Returns a text with the measures before and after, the verdict, and the files in the folder."""
        lines, evaluations = [], self.evaluations()
        if evaluations:
            first, last = evaluations[0], evaluations[-1]
            lines.append(f"\nheld-out rewards, step {first['step']} → step {last['step']}:")
            before, after = (e["rewards"] | {m: e[m] for m in MEASURES if m in e} for e in (first, last))
            for name in (name for name in before if name in after):
                lines.append(f"  {name:32s} {_shown(before[name])} → {_shown(after[name])}")
        # A run that was finished before has written no report in this process.
        verdict = self._verdict or self._report_on(lambda run: judge(run.points, run.untrained) if run.points else None)
        if verdict:
            lines.append(verdict.sentence)
        steps = [row for row in self.metrics.rows() if row["kind"] == "train"]
        if steps and steps[-1]["skipped_steps"]:
            lines.append(f"skipped, because not finite: {steps[-1]['skipped_steps']} updates of {len(steps)} steps")
        lines.append(f"in {self.folder}: " + ", ".join(sorted(path.name for path in self.folder.glob("[!.]*"))))
        return "\n".join(lines)


def choose_folder(config: ConfigDict, checkpoint: Path | None) -> Path:
    """Returns the run folder: log_dir/run_name, or without a run_name the folder of the checkpoint's run if it has one.

    Raises:
        ConfigError: the folder contains another run, or cannot be written to.
    """
    c = config
    own = run_folder_of(checkpoint) if checkpoint else None
    name = c.run_name or f"{c.get('preset', c.task)}_{time.strftime('%Y%m%d_%H%M%S')}"
    folder = own if own and not c.run_name else Path(c.log_dir) / name
    if c.task == "train" and own != folder.resolve() and checkpoints_of(folder):
        raise ConfigError(
            f"run_name = {c.run_name!r}: {str(folder)!r} already holds a run; choose another name, or continue it "
            f"with resume_from={str(folder)!r}"
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"log_dir = {c.log_dir!r}, run_name = {c.run_name!r}: {str(existing)!r} is not a folder that can be "
            "written to; another run_name puts the results elsewhere"
        )
    return folder


def prompt(label: str) -> str:
    """Returns the prompt in a picture's caption; `Evaluation.labels` puts it above the score."""
    return label.rpartition("\n")[0]


def _shown(value: float | None) -> str:
    value = float("nan") if value is None else value
    return f"{value:8.1e}" if 0 < abs(value) < 0.01 else f"{value:8.3f}"
