"""Finds when several ways of training first reach a held-out reward, and compares them.

A curve is a list of points: dicts with "steps", "seconds", "cpu_seconds", "reward" and "obedience". The first point is
before training.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from scripts.bench.tables import markdown

CLOCKS = ("seconds", "cpu_seconds")


def crossing(curve: Sequence[dict], target: float) -> dict | None:
    """Returns the point where a curve that begins below the target first reaches it, linearly interpolated, or None."""
    for before, after in pairwise(curve):
        if after["reward"] >= target:
            share = (target - before["reward"]) / (after["reward"] - before["reward"])
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return None


def summary(curves: dict[str, list], rivals: Sequence[str], target: float) -> dict[str, dict]:
    """Returns the figures of each way of training.

    Args:
        curves: For each way of training, a curve for each seed.
        rivals: All are compared with the fastest of these, by its median seconds.

    Returns:
        For each way: "reached" has each seed's crossing, or None. "median" has the median of each number in them.
        "speedup" says how many times less of each clock it takes than the fastest rival: [of the medians, the least of
        a seed, the greatest]. The last two are None if a seed has not reached the target, and "speedup" also if no
        rival has reached it with all seeds.
    """
    found = {name: {"reached": [crossing(curve, target) for curve in seeds]} for name, seeds in curves.items()}
    for one in found.values():
        points = one["reached"]
        one["median"] = None if None in points else {n: statistics.median(p[n] for p in points) for n in points[0]}
    arrived = [found[name] for name in rivals if found[name]["median"]]
    rival = min(arrived, key=lambda one: one["median"]["seconds"], default=None)
    for one in found.values():
        one["speedup"] = {c: _speedup(rival, one, c) for c in CLOCKS} if rival and one["median"] else None
    return found


def _speedup(rival: dict, one: dict, clock: str) -> list[float]:
    ratios = [theirs[clock] / ours[clock] for theirs, ours in zip(rival["reached"], one["reached"], strict=True)]
    return [rival["median"][clock] / one["median"][clock], min(ratios), max(ratios)]


def table(results: dict[str, dict]) -> str:
    """Returns a Markdown table of what `summary` returns."""
    rows = []
    for name, one in results.items():
        points, median, speedup = [p for p in one["reached"] if p], one["median"], one["speedup"]
        row = [name, f"{len(points)} of {len(one['reached'])}", f"{median['steps']:.1f}" if median else "–"]
        for clock in CLOCKS:
            seconds = [point[clock] for point in points]
            row.append(f"{median[clock]:.1f} ({min(seconds):.1f} … {max(seconds):.1f})" if median else "–")
        row += ["{:.2f} ({:.2f} … {:.2f})".format(*speedup[clock]) if speedup else "–" for clock in CLOCKS]
        rows.append([*row, f"{median['obedience']:.3f}" if median else "–"])
    header = ["way", "seeds", "steps", "s", "CPU s", "times faster", "times faster, CPU", "obedience"]
    return markdown(header, rows)


def draw(curves: dict[str, list], target: float, path: Path) -> None:
    """Draws the held-out reward against processor seconds of training, with a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="symlog", xlabel="processor seconds of training", ylabel="held-out reward")
    for i, (name, seeds) in enumerate(curves.items()):
        for j, curve in enumerate(seeds):
            seconds, rewards = ([point[key] for point in curve] for key in ("cpu_seconds", "reward"))
            axes.plot(seconds, rewards, f"C{i}.-", label=f"_{name}" if j else name)
    axes.axhline(target, color="grey", linestyle=":")
    axes.legend()
    figure.savefig(path, dpi=120)
