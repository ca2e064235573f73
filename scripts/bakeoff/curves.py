"""Turns a run's metrics into a curve: a list of points, one for each evaluation, oldest first.

A point has the `samples` and processor `seconds` of training before it, and what was measured: `reward` (the trained
one), `obedience`, `diversity`, `base_distance`, ….
"""

import math
import statistics

import numpy as np


def curve(rows: list[dict]) -> list[dict]:
    """Returns the points of a run's metrics rows.

    The step after an evaluation also draws the evaluation's pictures, and the first step of a process warms up. Their
    seconds are replaced by the mean of the other steps, if there are any others.
    """
    after = ["eval", *(row["kind"] for row in rows)]
    train = [(row, before == "eval") for row, before in zip(rows, after, strict=False) if row["kind"] == "train"]
    clean = [_seconds(row) for row, is_first in train if not is_first]
    costs = iter([statistics.fmean(clean) if is_first and clean else _seconds(row) for row, is_first in train])
    points, samples, seconds, active = [], 0, 0.0, []
    for row in rows:
        if row["kind"] == "train":
            samples, seconds = row["samples"], seconds + next(costs)
            active += [row["active_steps"]] if "active_steps" in row else []
        elif row["reward"] is not None:
            measured = {name.rpartition(":")[2]: value for name, value in row["rewards"].items()}
            measured |= {name: row[name] for name in ("reward", "diversity", "base_distance") if name in row}
            measured |= {"active_steps": statistics.fmean(active)} if active else {}
            points.append({"samples": samples, "seconds": seconds, **measured})
    return points


def _seconds(row: dict) -> float:
    """Returns the processor seconds of a step, because on a shared machine wall-clock seconds depend on other users."""
    return row.get("cpu_seconds", row["seconds"])


def value_at(points: list[dict], axis: str, budget: float, measure: str) -> float | None:
    """Interpolates `measure` linearly between evaluations along `axis`, which is "samples" or "seconds".

    Returns None beyond the last evaluation, or if `measure` was not measured.
    """
    found = [(p[axis], p[measure]) for p in points if p.get(measure) is not None]
    if not found or found[-1][0] < budget:
        return None
    return float(np.interp(budget, *zip(*found, strict=True)))


def mean_error(values) -> dict | None:
    """Returns mean, standard error and number of the values that are not None. A single value has the error None."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return {"mean": statistics.fmean(found), "stderr": error, "n": len(found)}


def samples_to_reach(points: list[dict], target: float) -> tuple[int, float] | None:
    """Returns the samples at the first evaluation with a reward of at least `target`, or None if there is none.

    The second value is interpolated linearly between that evaluation and the one before.
    """
    for n, point in enumerate(points):
        if point["reward"] >= target:
            if n == 0:
                return point["samples"], float(point["samples"])
            low = points[n - 1]
            share = (target - low["reward"]) / (point["reward"] - low["reward"])
            return point["samples"], low["samples"] + share * (point["samples"] - low["samples"])
    return None
