"""The rules of GenEval (arXiv 2310.11513): when detected objects are those that a prompt asks for.

The rules and numbers are those of the benchmark's published code. Nothing here needs a network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rewards.base import did_you_mean
from rewards.errors import RewardError
from rewards.segmenters import Detection, Found

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MOST = 16  # objects of a class
MARGIN = 0.1  # the share of both objects' sizes that an offset must exceed


class Clause(NamedTuple):
    """A part of a prompt's metadata: so many objects of a class, in a colour or at a place if these are named.

    Attributes:
        target: The number of the earlier clause whose objects the place refers to.
    """

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Returns which of RELATIONS a box has to another one; boxes are left, top, right, bottom, and y points down.

    An offset of the centres counts only as far as it exceeds MARGIN times the summed sizes. Two relations may hold.
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i]) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - MARGIN * size, 0), o) for o, size in zip(offset, sizes, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    return {name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds}


def kept(detections: Sequence[Detection], threshold: float, max_overlap: float = 1.0) -> list[Detection]:
    """Returns the detections of a class that count, the surest first: at most MOST with a score above the threshold.

    If `max_overlap` is below 1, one whose intersection over union with a surer one reaches it is left out.
    """
    surest = sorted((one for one in detections if one.score > threshold), key=lambda one: -one.score)[:MOST]
    if max_overlap == 1:
        return surest
    result: list[Detection] = []
    for one in surest:
        if all(_overlap(one.box, other.box) < max_overlap for other in result):
            result.append(one)
    return result


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes whose right and bottom edges still belong to them, as in the benchmark."""
    shared = _area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def shares(
    include: Sequence[Clause], exclude: Sequence[Clause], found: Found, colours: Callable[[str, list], list[str]]
) -> list[float]:
    """Returns, for each clause, the share in [0, 1] of its conditions that hold. GenEval's "correct" is: all are 1.

    An included clause looks at its `count` surest objects. Each of them has to be there, to have the colour if there is
    one, and to have the relation to all objects of the target clause if there is one. More objects do no harm. An
    excluded clause holds if there are fewer than `count` objects; each object too many takes 1 / count from its share.

    Args:
        found: The detections of each class, the surest first.
        colours: (name, detections) -> the colour of each detection.
    """
    groups: list[list[Detection]] = []
    result = []
    for clause in include:
        objects = found[clause.name][: clause.count]
        groups.append(objects)
        held = [len(objects)]
        if clause.colour:
            held.append(colours(clause.name, objects).count(clause.colour) if objects else 0)
        if clause.relation:
            held.append(sum(_is_placed(one, clause.relation, groups[clause.target]) for one in objects))
        result.append(sum(held) / (clause.count * len(held)))
    for clause in exclude:
        surplus = max(len(found[clause.name]) - clause.count + 1, 0)
        result.append(1 - min(surplus / clause.count, 1))
    return result


def _is_placed(one: Detection, relation: str, targets: Sequence[Detection]) -> bool:
    return bool(targets) and all(relation in relations(one.box, target.box) for target in targets)


def read_clauses(prompt: str, row: Mapping) -> tuple[list[Clause], list[Clause]]:
    """Reads the "include" and "exclude" of GenEval's metadata.

    Raises:
        RewardError: They are missing or not as in GenEval.
    """
    include, exclude = row.get("include"), row.get("exclude", [])
    for key, value in (("include", include), ("exclude", exclude)):
        if not isinstance(value, list) or (key == "include" and not value):
            raise RewardError(
                f"prompt {prompt!r}: metadata {key!r} is {value!r}; geneval needs a list of objects such as "
                "{'class': 'dog', 'count': 2}, as in the prompt set geneval"
            )
    return [_clause(c, prompt, i) for i, c in enumerate(include)], [_clause(c, prompt, 0) for c in exclude]


def _clause(entry: Any, prompt: str, number: int) -> Clause:
    place = f"prompt {prompt!r}: metadata {entry!r}"
    if not isinstance(entry, Mapping):
        raise RewardError(f"{place} must be an object with 'class' and 'count'")
    name, count, colour, position = (entry.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(name, str) or not name.strip():
        raise RewardError(f"{place}: 'class' must be the name of a kind of object")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise RewardError(f"{place}: 'count' must be a whole number from 1")
    if colour is not None and colour not in COLOURS:
        raise RewardError(f"{place}: 'color' must be one of {', '.join(COLOURS)}{did_you_mean(colour, COLOURS)}")
    if position is None:
        return Clause(name.strip(), count, colour)
    try:
        relation, target = position
    except (TypeError, ValueError):
        relation, target = None, 0
    if relation not in RELATIONS or target not in range(number):
        raise RewardError(
            f"{place}: 'position' must be one of {', '.join(RELATIONS)} and the number of an earlier included object, "
            "counted from 0"
        )
    return Clause(name.strip(), count, colour, relation, target)
