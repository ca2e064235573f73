"""Finds the published files of weights that are on no hub, so that a person has to fetch them."""

import os
from pathlib import Path

from rewards.errors import RewardError
from rewards.towers import find_file


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
