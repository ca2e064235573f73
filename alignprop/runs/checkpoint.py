"""The checkpoints of a run: writes them whole, finds them again, and keeps a limited number of them.

<run>/checkpoints/checkpoint_<step>/
    pytorch_lora_weights.safetensors   the usable weights: load in any diffusers pipeline (or denoiser/ without LoRA)
    training_state.pt                  the state to resume from: optimizer, scaler, moving average, step
    manifest.json                      the size and SHA-256 of every other file; the base model
<run>/checkpoints/best                 a link to the checkpoint with the highest held-out reward
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from alignprop.lora.fetch import fetch_lora, is_hub_name
from alignprop.runs.manifest import MANIFEST, STATE_FILE, damage_of, is_for_a_stop, write_manifest
from alignprop.settings.errors import ConfigError


def checkpoints_of(run_folder) -> list[Path]:
    """Returns the checkpoints of a run folder, oldest first."""
    folders = Path(run_folder).glob("checkpoints/checkpoint_*")
    return sorted((p for p in folders if re.fullmatch(r"checkpoint_\d+", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the number of optimizer steps that were done before the checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint_"))


def find_checkpoint(resume_from: str, log_dir: str, field: str = "resume_from", run_name: str = "") -> Path | None:
    """Finds the checkpoint that the user means, and checks that it is whole.

    Args:
        resume_from: a checkpoint folder; a LoRA file; a run folder, for its newest checkpoint; a LoRA's hub name; or
            "latest", for the newest whole checkpoint of `run_name`, or of all runs in `log_dir` if `run_name` is empty.
        log_dir: the folder that contains the runs.
        field: the name of the setting, for error messages.
        run_name: the run that "latest" is about.

    Returns:
        The checkpoint's path. None for "latest" if the named run has no checkpoint yet; the run then starts at step 0.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged.
    """
    if resume_from == "latest":
        return _newest_whole(Path(log_dir), field, run_name)
    path = Path(os.path.expanduser(resume_from))
    path = path.resolve() if os.path.islink(path) else path  # `best` is a link.
    if not os.path.exists(path):  # Path.exists raises an error for a name that is too long.
        if is_hub_name(resume_from):
            return fetch_lora(resume_from, field)
        raise ConfigError(f"{field} = {resume_from!r} does not exist; give a checkpoint, a run folder or 'latest'")
    if checkpoints := checkpoints_of(path):
        path = checkpoints[-1]
    holds_weights = any(path.glob("*.safetensors")) or any((path / n).exists() for n in (STATE_FILE, "denoiser"))
    if path.is_dir() and not holds_weights and not (path / MANIFEST).exists():
        raise ConfigError(f"{field} = {resume_from!r} holds no checkpoint; give a checkpoint, a run folder or 'latest'")
    if damage := damage_of(path):
        own_run = run_folder_of(path)
        others = reversed(checkpoints_of(own_run) if own_run else [])
        whole = next((p for p in others if p != path and not damage_of(p)), None)
        earlier = f"the newest whole one is {str(whole)!r}" if whole else "no other of its run is whole"
        raise ConfigError(f"{field} = {resume_from!r}: {str(path)!r} is damaged ({damage}); {earlier}")
    return path


def _newest_whole(log_dir: Path, field: str, run_name: str) -> Path | None:
    runs = [checkpoints_of(run) for run in ([log_dir / run_name] if run_name else log_dir.glob("*"))]
    newest_first = sorted(filter(None, runs), key=lambda checkpoints: checkpoints[-1].stat().st_mtime, reverse=True)
    newest = [checkpoint for checkpoints in newest_first for checkpoint in reversed(checkpoints)]
    for checkpoint in newest:
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint
        print(f"warning: {field} = 'latest' skips {str(checkpoint)!r}, which is damaged ({damage})", file=sys.stderr)
    if run_name and not newest:
        return None
    where = f"run_name = {run_name!r}" if run_name else f"no run in log_dir = {str(log_dir)!r}"
    raise ConfigError(f"{field} = 'latest', but {where} has {'no whole' if newest else 'a'} checkpoint")


def run_folder_of(checkpoint: Path) -> Path | None:
    """Returns the folder of the run that a checkpoint belongs to; None for a folder or file outside of a run."""
    path = checkpoint.resolve()
    is_a_runs = path.parent.name == "checkpoints" and re.fullmatch(r"(checkpoint|abandoned)_\d+", path.name)
    return path.parents[1] if is_a_runs else None


def write_checkpoint(
    run_folder, step: int, state: dict, write_weights: Callable[[Path], None], base: dict, for_a_stop: bool = False
) -> Path:
    """Writes a checkpoint into a temporary folder, flushes it to the disk and renames it, so it is whole or absent.

    Args:
        run_folder: the folder of the run.
        step: the number of optimizer steps done so far.
        state: nested dicts and lists of tensors, numbers and strings.
        write_weights: writes the usable weights into the folder that it is given.
        base: the result of `base_model` for the run's model.
        for_a_stop: True if the run saves only because it was asked to stop, at a step where no checkpoint is due.

    Raises:
        ConfigError: the checkpoint could not be written, for example because the disk is full. Earlier checkpoints
            are unchanged.
    """
    folder = Path(run_folder) / "checkpoints"
    temporary, final = folder / f"writing_{step}", folder / f"checkpoint_{step}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_weights(temporary)
        torch.save(state, temporary / STATE_FILE)
        write_manifest(temporary, base, for_a_stop)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        temporary.rename(final)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap errors of the disk.
        shutil.rmtree(temporary, ignore_errors=True)
        reason, free = " ".join(str(error).split()), shutil.disk_usage(run_folder).free / 2**20
        earlier = "there is no earlier one"
        if checkpoints_of(run_folder):
            earlier = f"earlier ones are untouched; go on from there with resume_from={str(run_folder)!r}"
        raise ConfigError(
            f"the checkpoint of step {step} could not be written to {str(folder)!r}, where {free:.0f} MiB are free: "
            f"{reason} — {earlier}"
        ) from error
    return final


def prune(run_folder, limit: int, keep: Collection[Path], held_out: dict[int, float]) -> None:
    """Links `best` and deletes the oldest checkpoints.

    A checkpoint that was made for a stop does not count. It is deleted when the next regular checkpoint exists, so
    that a run that is often interrupted keeps the same checkpoints as any other run.

    Args:
        run_folder: the folder of the run.
        limit: the number of newest checkpoints to keep; 0 keeps all.
        keep: checkpoints that are never deleted. The best one is never deleted either.
        held_out: step -> held-out reward, for the steps at which it was measured.
    """
    checkpoints = checkpoints_of(run_folder)
    measured = [p for p in checkpoints if step_of(p) in held_out]
    best = max(measured, key=lambda p: held_out[step_of(p)], default=None)
    if best:
        link, temporary = best.with_name("best"), best.with_name("best.new")
        with suppress(OSError):  # Some file systems have no links. The checkpoint is kept even so.
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(best.name)
            os.replace(temporary, link)
    regular = [path for path in checkpoints if not is_for_a_stop(path)]
    after = step_of(regular[-1]) if regular else -1
    newest = [*regular[-limit:], *(path for path in checkpoints if step_of(path) > after)]
    kept = {path.resolve() for path in (*keep, *newest)} | {best and best.resolve()}
    for old in checkpoints:
        if old.resolve() not in kept:
            # A half-deleted folder must not look like a checkpoint: on a network drive somebody may be reading it.
            shutil.rmtree(old.rename(old.with_name(f"deleting_{step_of(old)}")), ignore_errors=True)


def clean_up(run_folder, step: int) -> None:
    """Brings a run folder to the state of a run at optimizer step `step`, whatever the run was doing when it stopped.

    Removes half-written and half-deleted checkpoints, and renames checkpoints of a later step to abandoned_<step>. A
    run that continues from `step` gives up those later steps, so none of them may count as its newest checkpoint.
    """
    for pattern in ("writing_*", "deleting_*"):
        for folder in Path(run_folder).glob(f"checkpoints/{pattern}"):
            shutil.rmtree(folder, ignore_errors=True)
    (Path(run_folder) / "checkpoints" / "best").unlink(missing_ok=True)  # `prune` links it again.
    # The newest checkpoint is renamed first, so that an interruption leaves a valid run of an earlier step.
    for checkpoint in reversed(checkpoints_of(run_folder)):
        if step_of(checkpoint) > step:
            abandoned = checkpoint.with_name(f"abandoned_{step_of(checkpoint)}")
            shutil.rmtree(abandoned, ignore_errors=True)
            checkpoint.rename(abandoned)


def read_state(checkpoint: Path) -> dict:
    """Reads the training state of a checkpoint. Never unpickles anything but tensors and plain values.

    Raises:
        ConfigError: the checkpoint has no training state, or it cannot be read.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ConfigError(
            f"resume_from = {str(checkpoint)!r} holds no {STATE_FILE}, which training continues from; to start a new "
            "run with this LoRA, give it as init_lora"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a damaged file.
        raise ConfigError(f"{str(path)!r} cannot be read ({type(error).__name__}); is the file whole?") from error


def _flush(path: Path) -> None:
    """Makes sure that the disk really holds a file, or the entries of a folder."""
    if os.name == "nt" and path.is_dir():  # Windows has no such call for folders.
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL means that the file system cannot flush folders.
            raise
    finally:
        os.close(descriptor)
