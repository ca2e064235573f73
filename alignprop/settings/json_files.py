"""JSON files that every reader takes: numbers that are not finite, for which JSON has no word, become null."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path


def write_json(path, content) -> None:
    """Writes `content` whole or not at all, and says so where some of its numbers are not finite."""
    path = Path(path)
    lost: list[str] = []
    text = json.dumps(finite(content, lost), indent=2, allow_nan=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)  # so that a full disk leaves the earlier one
    if lost:
        print(
            f"warning: {len(lost)} numbers in {path} are not finite and stand there as null: {', '.join(lost[:3])}"
            + (", …" if len(lost) > 3 else ""),
            file=sys.stderr,
        )


def finite(value, lost: list[str] | None = None, where: str = ""):
    """The same with None for each float that is not finite, in dicts and lists at any depth.

    Args:
        lost: gets the place of each, such as "per_prompt.a cat.mean".
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
