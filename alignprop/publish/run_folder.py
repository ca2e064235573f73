"""What a run has left on the disk, for those who publish or export it."""

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
    """What a run has left so far, finished or not.

    Attributes:
        folder: where.
        config: config.json, {"train.learning_rate": 1e-3, …}.
        rows: of metrics.jsonl, oldest first.
        checkpoint: the best or, where none was found to be that, the last.
    """

    folder: Path
    config: dict
    rows: list[dict]
    checkpoint: Path

    @property
    def step(self) -> int:
        """The optimizer steps that made the weights of `checkpoint`."""
        return step_of(self.checkpoint)

    @property
    def evaluations(self) -> list[dict]:
        return [row for row in self.rows if row["kind"] == "eval"]

    @property
    def grid(self) -> Path:
        """The pictures of `checkpoint`, where it has been evaluated."""
        return self.folder / "samples" / f"step_{self.step:06d}.png"

    @property
    def has_own_grid(self) -> bool:
        """Whether the checkpoint has pictures that before_after.png does not show, because it is not the last."""
        last = self.evaluations[-1]["step"] if self.evaluations else 0
        return self.grid.exists() and not (last == self.step and (self.folder / "before_after.png").exists())

    @property
    def has_lora(self) -> bool:
        return (self.checkpoint / LORA_FILE).exists()


def read_run(folder: Path) -> RunFolder:
    """Raises: ConfigError: no run, or one without a whole checkpoint."""
    try:
        config = flatten(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, AttributeError):
        config = {}
    if "pretrained.model" not in config:
        raise ConfigError(f"{str(folder)!r} is not the folder of a run: it has no config.json of one")
    best = folder / "checkpoints" / "best"
    checkpoints = [best.resolve()] if best.exists() else checkpoints_of(folder)
    if not checkpoints:
        raise ConfigError(f"{str(folder)!r} has no checkpoint yet")
    if damage := damage_of(checkpoints[-1]):
        raise ConfigError(f"{str(checkpoints[-1])!r} is damaged ({damage})")
    return RunFolder(folder, config, MetricsLog(folder / "metrics.jsonl").rows(), checkpoints[-1])
