"""Checkpoints of a run: writing them whole, finding them again, keeping a limited number.

<run>/checkpoints/checkpoint_<step>/
    pytorch_lora_weights.safetensors   what to use: loads in any diffusers pipeline (or denoiser/ without LoRA)
    training_state.pt                  what to resume from: optimizer, scaler, moving average, random states, step
"""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignprop.settings import ConfigError

STATE_FILE = "training_state.pt"


def checkpoints_of(run_folder) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = Path(run_folder).glob("checkpoints/checkpoint_*")
    return sorted((p for p in found if re.fullmatch(r"checkpoint_\d+", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps before it was saved."""
    return int(checkpoint.name.removeprefix("checkpoint_"))


def find_checkpoint(resume_from: str, log_dir: str, field: str = "resume_from") -> Path:
    """The checkpoint that a person means by a checkpoint folder, a run folder (its newest) or "latest" (of all runs).

    Raises:
        ConfigError: there is none.
    """
    if resume_from == "latest":
        newest = [runs[-1] for run in Path(log_dir).glob("*") if (runs := checkpoints_of(run))]
        if not newest:
            raise ConfigError(f"{field} = 'latest', but no run in log_dir = {log_dir!r} has a checkpoint")
        return max(newest, key=lambda checkpoint: checkpoint.stat().st_mtime)
    path = Path(resume_from)
    if not path.exists():
        raise ConfigError(f"{field} = {resume_from!r} does not exist; give a checkpoint, a run folder or 'latest'")
    if checkpoints := checkpoints_of(path):
        return checkpoints[-1]
    holds_weights = any(path.glob("*.safetensors")) or any((path / n).exists() for n in (STATE_FILE, "denoiser"))
    if path.is_dir() and not holds_weights:
        raise ConfigError(f"{field} = {resume_from!r} holds no checkpoint; give a checkpoint, a run folder or 'latest'")
    return path


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to; None for a folder or file that lies elsewhere."""
    return checkpoint.resolve().parents[1] if checkpoint.resolve().parent.name == "checkpoints" else None


def write_checkpoint(run_folder, step: int, state: dict, write_weights: Callable[[Path], None], limit: int) -> Path:
    """Writes a checkpoint into a temporary folder, then renames it, so that one is whole or absent.

    Args:
        state: nested dicts and lists of tensors, numbers and strings.
        write_weights: writes the usable weights into the folder that it is given.
        limit: how many checkpoints to keep, this one included; 0 keeps all.
    """
    folder = Path(run_folder) / "checkpoints"
    temporary, final = folder / f"writing_{step}", folder / f"checkpoint_{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_weights(temporary)
    torch.save(state, temporary / STATE_FILE)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    if limit:
        for old in checkpoints_of(run_folder)[:-limit]:
            shutil.rmtree(old)
    return final


def set_aside_after(run_folder, step: int) -> None:
    """Renames checkpoints of a later step to abandoned_<step>: a run that continues from `step` leaves that future,
    and its newest checkpoint must not be mistaken for the run's."""
    for checkpoint in checkpoints_of(run_folder):
        if step_of(checkpoint) > step:
            abandoned = checkpoint.with_name(f"abandoned_{step_of(checkpoint)}")
            shutil.rmtree(abandoned, ignore_errors=True)
            checkpoint.rename(abandoned)


def read_state(checkpoint: Path) -> dict:
    """The training state of a checkpoint. Never unpickles anything but tensors and plain values.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ConfigError(f"resume_from = {str(checkpoint)!r} holds no {STATE_FILE}, which training continues from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ConfigError(f"{str(path)!r} cannot be read ({type(error).__name__}); is the file whole?") from error


def random_state() -> dict:
    """The global random states of this process, which custom rewards may use. Ours come from keys instead."""
    numpy_state = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": list(random.getstate()),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
    }


def restore_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def load_denoiser(denoiser, folder: Path) -> None:
    """Loads fully fine-tuned weights, as diffusers' `save_pretrained` wrote them.

    Raises:
        ConfigError: they are not this denoiser's.
    """
    tensors = {}
    denoiser.float()  # as it was trained
    try:
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        denoiser.load_state_dict(tensors)
    except (RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{str(folder)!r} does not fit this model: {str(error).splitlines()[-1].strip()}") from error
