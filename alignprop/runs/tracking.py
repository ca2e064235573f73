"""Writes a run's metrics as JSON lines, and sends them to wandb, tensorboard or trackio.

A metrics row is a dict of numbers. A quantity with parts is a list or a dict of numbers:

    {"kind": "train", "step": 3, "epoch": 0, "reward": 5.2, "grad_norm": 0.8, "adjoint_norm": [null, 0.1]}
    {"kind": "eval", "step": 0, "epoch": 0, "reward": 5.0, "rewards": {"aesthetic": 5.0, "clip": 0.3}}

Only the main process writes. accelerate's trackers take care of that; for `MetricsLog` the caller does.
"""

import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from alignprop.evaluation.pictures import Pictures, draw_grid
from alignprop.settings.errors import ConfigError
from alignprop.settings.json_files import finite

TRACKERS = ("wandb", "tensorboard", "trackio")


class MetricsLog:
    """An append-only file of JSON objects, one per line. The first write creates the file and its folder."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, row: dict) -> None:
        """Writes one row. Non-finite floats become null; a tensor raises TypeError."""
        line = json.dumps(finite(row), allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict]:
        """Returns all rows, oldest first. It skips a last line that a killed run left half-written.

        Raises:
            ConfigError: any other line is not JSON.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows += [json.loads(line)] if line else []
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ConfigError(f"{self.path}: line {number} is damaged; delete that line to go on") from None
        return rows

    def truncate_after(self, step: int) -> None:
        """Drops rows of a larger ``step``, which a resumed run will write again, and a half-written last line."""
        kept = [row for row in self.rows() if row["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)


def parse_log_with(text: str) -> list[str] | None:
    """Returns the trackers that ``log_with`` names ("wandb,tensorboard"), in the form that `Accelerator` needs.

    Returns None for "", because accelerate warns about an empty list.

    Raises:
        ConfigError: a name is unknown, or its package is not installed (accelerate would silently log nothing).
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"log_with = {text!r}: {name!r} is not one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log_with = {text!r} needs the package {name}: pip install {name}")
    return names or None


def start_trackers(accelerator, project: str, run_name: str, run_folder: str | os.PathLike, config: Mapping) -> None:
    """Starts the accelerator's trackers and gives them the (nested) config. Every process has to call it.

    tensorboard needs the accelerator's ``project_dir``. It writes there, into a folder with the name ``project``.
    """
    init = {}
    # It depends on the folder, so that a resumed run continues the same run there.
    identity = hashlib.sha256(str(Path(run_folder).resolve()).encode()).hexdigest()[:16]
    if "wandb" in map(str, accelerator.log_with) and accelerator.is_main_process:
        init["wandb"] = {
            "name": run_name, "dir": str(run_folder), "mode": wandb_mode(), "id": identity, "resume": "allow"
        }  # fmt: skip
    if "trackio" in map(str, accelerator.log_with):
        init["trackio"] = {"name": f"{run_name}-{identity[:6]}", "resume": "allow"}
    accelerator.init_trackers(project, config=_flatten(config), init_kwargs=init)


def wandb_mode() -> str:
    """Returns WANDB_MODE if it is set; else "online" if wandb logs in without asking, else "offline"."""
    import wandb

    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    try:
        reason = None if wandb.login(prompt=False, verify=True) else "nobody is logged in (wandb login)"
    except (wandb.errors.Error, ValueError) as error:  # There is no network, or the key is not valid.
        reason = str(error).split("\n")[0]
    if reason is None:
        return "online"
    print(f"warning: wandb runs offline: {reason}; send the run later with `wandb sync`", file=sys.stderr)
    return "offline"


def log_row(accelerator, row: dict) -> None:
    """Sends the finite numbers of a metrics row to every tracker, as "train/reward", "eval/rewards/clip" and so on."""
    numbers = {
        f"{row['kind']}/{key}": value
        for key, value in _flatten(row).items()
        if isinstance(value, int | float) and math.isfinite(value) and key != "step"
    }
    accelerator.log(numbers, step=row["step"])


def log_images(accelerator, name: str, images: Pictures, labels: Sequence[str], step: int) -> None:
    """Sends pictures with their labels, as one grid, to every tracker."""
    for tracker in accelerator.trackers:
        grid = np.asarray(draw_grid(images, labels))
        if tracker.name == "trackio":  # accelerate's tracker of that name has no pictures
            import trackio

            tracker.tracker.log({name: trackio.Image(grid)}, step=step)
            continue
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: grid[None]}, step=step, **options)


def _flatten(config: Mapping, prefix: str = "") -> dict[str, int | float | str | bool]:
    """Turns nested dicts into "outer/inner" keys, and values that are not numbers into text, as tensorboard needs."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + str(key)] = value if isinstance(value, int | float | str) else str(value)
    return flat
