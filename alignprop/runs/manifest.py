"""What a checkpoint says of itself: the size and SHA-256 of its files, and the base model that it belongs to."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from alignprop.settings.errors import ConfigError
from alignprop.settings.json_files import write_json

MANIFEST = "manifest.json"
STATE_FILE = "training_state.pt"


def write_manifest(checkpoint: Path, base: dict, for_a_stop: bool = False) -> None:
    """Lists every file that `checkpoint` holds now.

    Args:
        base: what `base_model` says of the model.
        for_a_stop: it was made because the run was asked to stop, at a step where none is due.
    """
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_json(checkpoint / MANIFEST, {"base_model": base, "files": files, "for_a_stop": for_a_stop})


def is_for_a_stop(checkpoint: Path) -> bool:
    """Whether a checkpoint was made for a stop alone; a damaged or an older one counts as any other."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text()).get("for_a_stop", False)
    except (OSError, ValueError, AttributeError):
        return False


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, compared with its manifest; "" where nothing is.

    A LoRA file or a folder from elsewhere, without training state, has no manifest and is taken as it is.
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
    """What tells a base model from others of the same shape: its name, and one weight of some of its tensors."""
    tensors = [p.detach() for _, p in sorted(denoiser.named_parameters()) if p.dim() > 1]
    chosen = tensors[:: max(1, len(tensors) // 32)][:32]
    values = torch.stack([t.flatten()[t.numel() // 2].float() for t in chosen]).tolist()
    return {"name": name, "weights": [float(f"{value:.4g}") for value in values]}


def check_base(checkpoint: Path, base: dict, field: str = "resume_from") -> None:
    """Refuses a checkpoint of another base model; says nothing of files from elsewhere, which name none.

    Raises:
        ConfigError: it names both models.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return
    other = json.loads(manifest.read_text())["base_model"]
    # Half precision keeps three digits of a weight.
    same = len(other["weights"]) == len(base["weights"]) and np.allclose(
        other["weights"], base["weights"], rtol=2**-7, atol=1e-4
    )
    if not same:
        raise ConfigError(
            f"{field} = {str(checkpoint)!r} was trained on pretrained.model = {other['name']!r}, and this run loads "
            f"{base['name']!r}, whose weights differ"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
