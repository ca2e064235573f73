"""Finds and reads published files of weights that are on no hub, or are whole pickled modules."""

import os
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rewards.errors import RewardError
from rewards.files import find_file, load_weights


def find_checkpoint(file: str, repo: str | None, revision: str | None, fields: tuple[str, str], hint: str = "") -> Path:
    """Returns the path of the local file `file`, or of the file of that name in the hub repository or folder `repo`.

    Args:
        repo: None: only a local file will do.
        fields: The options that name the file and the repository, for an error.
        hint: What an error says if there is no such local file and no repository: where the file comes from.

    Raises:
        RewardError: The file is not found.
    """
    path = Path(os.path.expanduser(file))
    if path.is_file():
        return path
    if path.is_absolute() or repo is None:
        raise RewardError(f"{fields[0]}={file!r} does not exist{hint and f'; {hint}'}")
    return find_file(repo, file, revision, fields[1])


def load_module_weights(path: str | Path, field: str) -> dict[str, torch.Tensor]:
    """Returns the state dict in a file that holds one, or that holds a whole module saved by `torch.save(module)`.

    No code of the module is imported or run, whatever the file says: each class and function that it names, and that
    torch does not trust, is read as a `_Shell`.

    Args:
        field: The option to name in an error.

    Raises:
        RewardError: The file is missing or damaged, or its tensors cannot be read in this way.
    """
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it is missing, damaged or a .safetensors file, all of which load_weights deals with
        foreign = []
    if not foreign:
        return load_weights(path, field)
    try:
        with safe_globals([(_Shell, name) for name in foreign]):
            module = torch.load(path, map_location="cpu", weights_only=True)
        return _weights_of(module) if isinstance(module, dict) else dict(_tensors(module))
    except Exception as error:  # torch refuses some pickles, and others hold no module
        raise RewardError(
            f"{field}={str(path)!r} is a pickle whose weights cannot be read without running its code; where that code "
            "is installed and you trust the file, load the module there and save its state_dict()"
        ) from error


def _weights_of(content: dict) -> dict[str, torch.Tensor]:
    """Returns the tensors of a dict, or of its entry "state_dict", which may lie beside foreign objects."""
    weights = content.get("state_dict", content)
    return {name: tensor for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}


class _Shell:
    """Takes the place of an object of another package, of which it keeps the attributes alone."""

    def __new__(cls, *arguments, **keywords):
        return super().__new__(cls)

    def __init__(self, *arguments, **keywords):
        pass


def _tensors(module: _Shell, prefix: str = ""):
    """Yields (name, tensor) of the parameters and buffers of a module that was read as a `_Shell`."""
    own = vars(module)
    for name, tensor in {**own["_parameters"], **own["_buffers"]}.items():
        if tensor is not None:
            yield prefix + name, tensor.detach()
    for name, child in own["_modules"].items():
        yield from _tensors(child, f"{prefix}{name}.")
