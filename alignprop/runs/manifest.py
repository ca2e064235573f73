"""The manifest of a checkpoint: the size and SHA-256 of its files, and the base model that it belongs to."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from alignprop.models.packed import Packed
from alignprop.settings.errors import ConfigError
from alignprop.settings.json_files import write_json

MANIFEST = "manifest.json"
STATE_FILE = "training_state.pt"


def write_manifest(checkpoint: Path, base: dict, for_a_stop: bool = False) -> None:
    """Writes a manifest that lists every file that is in `checkpoint` now.

    Args:
        checkpoint: the folder of the checkpoint.
        base: the result of `base_model` for the run's model.
        for_a_stop: True if it was made only because the run was asked to stop, at a step where no checkpoint is due.
    """
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_json(checkpoint / MANIFEST, {"base_model": base, "files": files, "for_a_stop": for_a_stop})


def is_for_a_stop(checkpoint: Path) -> bool:
    """Whether a checkpoint was made only for a stop; False if its manifest cannot be read or does not say it."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text()).get("for_a_stop", False)
    except (OSError, ValueError, AttributeError):
        return False


def damage_of(checkpoint: Path) -> str:
    """Says what is wrong with a checkpoint's files, compared with its manifest; "" if nothing is wrong.

    A LoRA file or a folder from elsewhere has no manifest and no training state. It is not checked.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing" if (checkpoint / STATE_FILE).exists() else ""
    try:
        content = json.loads(manifest.read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        assert isinstance(content["base_model"]["weights"], list)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError):
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in files.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _sha256(path) != digest:
                return f"{name} does not have the SHA-256 that it was written with"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def base_model(name: str, denoiser: torch.nn.Module) -> dict:
    """Returns what identifies a base model among others of the same shape: its name, and one weight of some tensors."""
    packed = {f"{name}.weight": m for name, m in denoiser.named_modules() if isinstance(m, Packed)}
    names = sorted([name for name, p in denoiser.named_parameters() if p.dim() > 1] + [*packed])
    chosen = names[:: max(1, len(names) // 32)][:32]
    weights = [packed[name].weight if name in packed else denoiser.get_parameter(name).detach() for name in chosen]
    values = torch.stack([w.flatten()[w.numel() // 2].float() for w in weights]).tolist()
    return {"name": name, "weights": [float(f"{value:.4g}") for value in values]}


def check_base(checkpoint: Path, base: dict, field: str = "resume_from") -> None:
    """Refuses a checkpoint of another base model. Files from elsewhere name no base model and are not checked.

    Raises:
        ConfigError: the checkpoint belongs to another base model; the message names both.
    """
    other = _base_of(checkpoint)
    if other and not _is_same(other, base):
        raise ConfigError(
            f"{field} = {str(checkpoint)!r} was trained on pretrained.model = {other['name']!r}, but this run loads "
            f"{base['name']!r}, {_difference(base, other)}"
        )


def check_same_base(first: Path, second: Path, field: str) -> None:
    """Refuses two checkpoints of different base models. Files from elsewhere name no base model and are not checked.

    Args:
        first: a checkpoint.
        second: another one.
        field: the name of the option with the second one.

    Raises:
        ConfigError: they belong to different base models; the message names both.
    """
    one, other = _base_of(first), _base_of(second)
    if one and other and not _is_same(one, other):
        raise ConfigError(
            f"{field} = {str(second)!r} was trained on pretrained.model = {other['name']!r}, and {str(first)!r} on "
            f"{one['name']!r}, {_difference(one, other)}"
        )


def _difference(base: dict, other: dict) -> str:
    if base["name"] == other["name"]:
        return "with different weights: pretrained.loras, pretrained.denoiser or the files are others"
    return "which has different weights"


def _base_of(checkpoint: Path) -> dict | None:
    manifest = checkpoint / MANIFEST
    return json.loads(manifest.read_text())["base_model"] if manifest.is_file() else None


def _is_same(one: dict, other: dict) -> bool:
    # The tolerance is this large because half precision keeps only three digits of a weight.
    return len(one["weights"]) == len(other["weights"]) and np.allclose(
        one["weights"], other["weights"], rtol=2**-7, atol=1e-4
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
