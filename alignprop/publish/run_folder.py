"""Reads the folder of a run, to publish it."""

import json
from dataclasses import dataclass
from pathlib import Path

from alignprop.lora.files import LORA_FILE
from alignprop.runs.checkpoint import checkpoints_of, step_of
from alignprop.runs.manifest import damage_of
from alignprop.runs.tracking import MetricsLog
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import flatten


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder; the run may be finished or not.

    Attributes:
        folder: the path of the folder.
        config: the content of config.json as {"train.learning_rate": 1e-3, …}.
        rows: the rows of metrics.jsonl, oldest first.
        checkpoint: the best checkpoint, or the last if no best one is known.
    """

    folder: Path
    config: dict
    rows: list[dict]
    checkpoint: Path

    @property
    def step(self) -> int:
        """The number of optimizer steps after which `checkpoint` was saved."""
        return step_of(self.checkpoint)

    @property
    def evaluations(self) -> list[dict]:
        return [row for row in self.rows if row["kind"] == "eval"]

    @property
    def grid(self) -> Path:
        """The path of the picture grid of `checkpoint`; it exists if the checkpoint has been evaluated."""
        return self.folder / "samples" / f"step_{self.step:06d}.png"

    @property
    def has_own_grid(self) -> bool:
        """Whether the checkpoint has a picture grid, and before_after.png does not show the same pictures already."""
        last = self.evaluations[-1]["step"] if self.evaluations else 0
        return self.grid.exists() and not (last == self.step and (self.folder / "before_after.png").exists())

    @property
    def has_lora(self) -> bool:
        return (self.checkpoint / LORA_FILE).exists()


def read_run(folder: Path) -> RunFolder:
    """Reads the folder of a run.

    Raises:
        ConfigError: the folder is not that of a run, it has no checkpoint, or its best or last checkpoint is damaged.
    """
    try:
        config = flatten(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, AttributeError):
        config = {}
    if "pretrained.model" not in config:
        raise ConfigError(f"{str(folder)!r} is not a run folder: it has no config.json that names a model")
    best = folder / "checkpoints" / "best"
    checkpoints = [best.resolve()] if best.exists() else checkpoints_of(folder)
    if not checkpoints:
        raise ConfigError(f"{str(folder)!r} has no checkpoint yet")
    if damage := damage_of(checkpoints[-1]):
        raise ConfigError(f"{str(checkpoints[-1])!r} is damaged ({damage})")
    return RunFolder(folder, config, MetricsLog(folder / "metrics.jsonl").rows(), checkpoints[-1])
