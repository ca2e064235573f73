"""What a run's metrics say, as a curve: a list of points, one an evaluation, oldest first.

A point has the `samples` and processor `seconds` of training before it, and what was measured: `reward` (the trained
one), `obedience`, `diversity`, `base_distance`, ….
"""

import math
import statistics

import numpy as np


def curve(rows: list[dict]) -> list[dict]:
    """The points of a run's metrics rows.

    The step after an evaluation also draws its pictures, and the first one of a process warms up: in the place of
    their seconds stands the mean of the others, where there are any.
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
    """Processor seconds of a step: on a machine that others use too, wall-clock seconds say how busy they are."""
    return row.get("cpu_seconds", row["seconds"])


def value_at(points: list[dict], axis: str, budget: float, measure: str) -> float | None:
    """Linear between evaluations along `axis`, "samples" or "seconds"; None beyond the last, or where not measured."""
    found = [(p[axis], p[measure]) for p in points if p.get(measure) is not None]
    if not found or found[-1][0] < budget:
        return None
    return float(np.interp(budget, *zip(*found, strict=True)))


def mean_error(values) -> dict | None:
    """Mean and standard error of what is not None; the error of a single value is NaN, written null."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return {"mean": statistics.fmean(found), "stderr": error, "n": len(found)}


def samples_to_reach(points: list[dict], target: float) -> tuple[int, float] | None:
    """Samples at the first evaluation with a reward of at least `target`, and linear between it and the one before."""
    for n, point in enumerate(points):
        if point["reward"] >= target:
            if n == 0:
                return point["samples"], float(point["samples"])
            low = points[n - 1]
            share = (target - low["reward"]) / (point["reward"] - low["reward"])
            return point["samples"], low["samples"] + share * (point["samples"] - low["samples"])
    return None
