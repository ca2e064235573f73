"""Writes JSON files that every program can read. JSON has no infinities and no NaN, so these become null."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` completely or not at all. It warns if some of the numbers are not finite."""
    path = Path(path)
    lost: list[str] = []
    text = json.dumps(finite(content, lost), indent=2, allow_nan=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)  # so that an earlier file survives if the disk is full
    if lost:
        print(
            f"warning: {len(lost)} numbers in {path} are not finite and were written as null: {', '.join(lost[:3])}"
            + (", …" if len(lost) > 3 else ""),
            file=sys.stderr,
        )


def finite(value: Any, lost: list[str] | None = None, where: str = "") -> Any:
    """Returns `value` with None for each float that is not finite, in dicts and lists at any depth.

    Args:
        lost: a list to which the place of each such float is added, for example "per_prompt.a cat.mean".
        where: the place of `value` itself.
    """
    inside = f"{where}." if where else ""
    if isinstance(value, Mapping):
        return {key: finite(item, lost, f"{inside}{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, lost, f"{inside}{i}") for i, item in enumerate(value)]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if lost is not None:
        lost.append(where)
    return None
