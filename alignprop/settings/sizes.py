"""Picture sizes, as a configuration and the command line write them."""

import math
import re
from typing import Any

from rewards.rules import is_integer


def picture_sizes(value: int | str | tuple[int | str, ...] | None) -> list[tuple[int, int]]:
    """Returns the (height, width) of pictures in pixels, the size with the most pixels first; [] for None.

    Args:
        value: a side, or "WIDTHxHEIGHT", or several of these, as a sequence or as text with commas.

    Raises:
        ValueError: the value is none of these.
    """
    if value is None:
        return []
    sizes: list[tuple[int, int]] = []
    for text in map(str, value if isinstance(value, tuple | list) else str(value).split(",")):
        width, _, height = text.lower().partition("x")
        sizes.append((int(height or width), int(width)))
    return sorted(sizes, key=math.prod, reverse=True)


def size_name(size: tuple[int, int]) -> str:
    """Returns the text for a size (height, width): the side of a square, or "WIDTHxHEIGHT"."""
    height, width = size
    return str(width) if width == height else f"{width}x{height}"


def is_size(value: Any) -> bool:
    """Whether a value is what `picture_sizes` takes, with sides of at least 16 pixels."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, tuple | list) else [value]
    return bool(parts) and all(map(_is_one_size, parts))


def _is_one_size(value: Any) -> bool:
    is_text = isinstance(value, str) and re.fullmatch(r"\d+([xX]\d+)?", value.strip(), re.ASCII) is not None
    return (is_text or is_integer(value)) and min(picture_sizes(value)[0]) >= 16
