"""Reads the files of runs and evaluations from which reports are made. It needs no model and no reward."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from alignprop.evaluation.looks import LOOKS
from alignprop.evaluation.pictures import read_grid
from alignprop.evaluation.report.verdict import Point
from alignprop.evaluation.stop_when import MEASURES
from alignprop.settings.errors import ConfigError

TEXTS = ("image", "prompt", "size")  # the columns of a file of scores that are no numbers


@dataclass(frozen=True)
class RunData:
    """What is known of a training run.

    Attributes:
        folder: the run folder.
        config: the resolved configuration, in groups.
        rows: the rows of metrics.jsonl.
        points: the evaluations of the same pictures as the last one, oldest first.
        checkpoints: the steps of the checkpoints, in order.
        trained: the names of the scores that were trained.
        untrained: the names of the scores that were only measured.
    """

    folder: Path
    config: dict
    rows: list[dict]
    points: list[Point]
    checkpoints: list[int]
    trained: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)

    def pictures(self, step: int) -> list[Image.Image]:
        """Returns the pictures that were kept of the evaluation at a step."""
        return pictures_of(self.folder / "samples" / f"step_{step:06d}.png")


def read_run(folder: Path, rows: list[dict], checkpoints: list[int]) -> RunData:
    """Reads a run folder.

    Args:
        folder: the run folder.
        rows: the rows of its metrics.jsonl.
        checkpoints: the steps of its checkpoints, in order.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    points = [
        Point(row["step"], *read_scores(file), _measures(row))
        for row in rows
        if row["kind"] == "eval" and (file := folder / "samples" / f"step_{row['step']:06d}.csv").exists()
    ]
    points = [point for point in points if point.prompts == points[-1].prompts]
    trained = next((list(row["rewards"]) for row in reversed(rows) if row["kind"] == "train"), [])
    names = points[-1].scores if points else {}
    untrained = [name for name in names if name not in (*trained, "reward", *LOOKS)] if trained else []
    trained = [name for name in trained if name in names]  # a run may continue with another reward
    same = [point for point in points if point.scores.keys() == names.keys()]
    return RunData(folder, config, rows, same, checkpoints, trained, untrained)


def _measures(row: dict) -> dict[str, float]:
    return {name: row[name] for name in MEASURES if row.get(name) is not None}


def read_scores(path: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Reads a file of scores.

    Returns:
        The prompts of the n pictures, and the scores by name, float64 [n].
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in TEXTS] if rows else []
    scores = {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in names}
    return [row["prompt"] for row in rows], scores


def pictures_of(grid: Path) -> list[Image.Image]:
    """Returns the pictures in a grid's file; none if there is no such file."""
    return [picture for _, picture in read_grid(grid)] if grid.exists() else []


def read_entry(path: Path) -> tuple[Point, list[Image.Image]]:
    """Reads one side of a comparison: the folder of an evaluation, or the last evaluation of a training run.

    Returns:
        The scores, and the pictures that were kept.

    Raises:
        ConfigError: the folder holds neither.
    """
    if (path / "scores.csv").exists():
        summary = path / "summary.json"  # which an evaluation writes after the scores
        measures = _measures(json.loads(summary.read_text(encoding="utf-8"))) if summary.exists() else {}
        return Point(0, *read_scores(path / "scores.csv"), measures), pictures_of(path / "grid.png")
    files = sorted(path.glob("samples/step_*.csv"))
    if not files:
        raise ConfigError(f"{str(path)!r} holds no evaluation: it has neither scores.csv nor samples/step_*.csv")
    step = int(files[-1].stem.removeprefix("step_"))
    return Point(step, *read_scores(files[-1])), pictures_of(files[-1].with_suffix(".png"))
