"""What a run writes down: metrics as JSON lines, and the same to wandb or tensorboard.

A metrics row is a dict of numbers, with lists and dicts of numbers where a quantity has parts:

    {"kind": "train", "step": 3, "epoch": 0, "reward": 5.2, "grad_norm": 0.8, "adjoint_norm": [null, 0.1]}
    {"kind": "eval", "step": 0, "epoch": 0, "reward": 5.0, "rewards": {"aesthetic": 5.0, "clip": 0.3}}

Only the main process writes: accelerate's trackers see to that, `MetricsLog` leaves it to its caller.
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
import torch

from alignprop.evaluation.pictures import draw_grid
from alignprop.settings.errors import ConfigError
from alignprop.settings.json_files import finite

TRACKERS = ("wandb", "tensorboard")


class MetricsLog:
    """An append-only file of JSON objects, one per line; it and its folder are made when the first is written."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, row: dict) -> None:
        """Write one row. Non-finite floats become null; a tensor raises TypeError."""
        line = json.dumps(finite(row), allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict]:
        """All rows, oldest first. A last line that a killed run left half-written is passed over.

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
        """Drop what a resumed run will do again: rows of a larger ``step``, a half-written last line."""
        kept = [row for row in self.rows() if row["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)


def parse_log_with(text: str) -> list[str] | None:
    """The trackers that ``log_with`` names, such as "wandb,tensorboard", as `accelerate.Accelerator` wants them.

    None for "", since accelerate takes an empty list for an oversight and warns.

    Raises:
        ConfigError: unknown name, or its package is not installed (accelerate would log nothing, silently).
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"log_with = {text!r}: {name!r} is not one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log_with = {text!r} needs the package {name}: pip install {name}")
    return names or None


def start_trackers(accelerator, project: str, run_name: str, run_folder: str | os.PathLike, config: Mapping) -> None:
    """Start the accelerator's trackers and give them the (nested) config. To be called by every process.

    tensorboard needs the accelerator's ``project_dir``; it writes under it, in a folder called ``project``.
    """
    init = {}
    if "wandb" in map(str, accelerator.log_with) and accelerator.is_main_process:
        # The same folder is the same run: a resumed one goes on where it was.
        identity = hashlib.sha256(str(Path(run_folder).resolve()).encode()).hexdigest()[:16]
        init["wandb"] = {
            "name": run_name, "dir": str(run_folder), "mode": wandb_mode(), "id": identity, "resume": "allow"
        }  # fmt: skip
    accelerator.init_trackers(project, config=_flatten(config), init_kwargs=init)


def wandb_mode() -> str:
    """WANDB_MODE where it is set; else "online" if wandb logs in without asking, else "offline"."""
    import wandb

    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    try:
        reason = None if wandb.login(prompt=False, verify=True) else "nobody is logged in (wandb login)"
    except (wandb.errors.Error, ValueError) as error:  # no network, or a key that is none
        reason = str(error).split("\n")[0]
    if reason is None:
        return "online"
    print(f"warning: wandb runs offline: {reason}; send the run later with `wandb sync`", file=sys.stderr)
    return "offline"


def log_row(accelerator, row: dict) -> None:
    """Send the finite numbers of a metrics row to every tracker, like "train/reward", "eval/rewards/clip"."""
    numbers = {
        f"{row['kind']}/{key}": value
        for key, value in _flatten(row).items()
        if isinstance(value, int | float) and math.isfinite(value) and key != "step"
    }
    accelerator.log(numbers, step=row["step"])


def log_images(accelerator, name: str, images: torch.Tensor, labels: Sequence[str], step: int) -> None:
    """Send pictures [B, 3, H, W] in [0, 1] with their labels, as one grid, to every tracker."""
    for tracker in accelerator.trackers:
        grid = np.asarray(draw_grid(images, labels))[None]
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: grid}, step=step, **options)


def _flatten(config: Mapping, prefix: str = "") -> dict[str, int | float | str | bool]:
    """Nested dicts as "outer/inner" keys; other than numbers becomes text, as tensorboard wants it."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + str(key)] = value if isinstance(value, int | float | str) else str(value)
    return flat
