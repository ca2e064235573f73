"""Computes the values at each budget, for a run and for a method over its seeds."""

from scripts.bakeoff.curves import mean_error, value_at

STEP = 8  # samples
COLUMNS = {  # title: the measure, and which of two values is better
    "reward at {samples} samples": ("reward_at_samples", max),
    "reward at {seconds:g} s": ("reward_at_seconds", max),
    "judge's rating": ("rating", max),
    "obedience": ("obedience", max),
    "diversity": ("diversity", max),
    "base distance": ("base_distance", min),
    "true size, -kB": ("jpeg_compressibility", max),
    f"s per {STEP} samples": ("step_seconds", min),
    "active steps": ("active_steps", None),
}


def values(points: list[dict], budget) -> dict[str, float | None]:
    """Returns the values of one run for the table."""
    at_samples = {m: value_at(points, "samples", budget.samples, m) for m, _ in COLUMNS.values()}
    last = points[-1] if points else {"samples": 0}
    return at_samples | {
        "reward_at_samples": value_at(points, "samples", budget.samples, "reward"),
        "reward_at_seconds": value_at(points, "seconds", budget.seconds, "reward"),
        "step_seconds": STEP * last["seconds"] / last["samples"] if last["samples"] else None,
        "active_steps": last.get("active_steps"),
    }


def summarise(curves: dict, budget) -> dict:
    """Returns {reward: {method: {measure: mean_error over the seeds}}} of the runs that have begun.

    The method "base" is the model before training.

    Args:
        curves: {(reward, method, seed): points}.
    """
    found = {}
    for reward in dict.fromkeys(key[0] for key in curves):
        own = {key: points for key, points in curves.items() if key[0] == reward and points}
        found[reward] = {}
        for method in dict.fromkeys(key[1] for key in own):
            runs = [values(points, budget) for key, points in own.items() if key[1] == method]
            found[reward][method] = {m: mean_error(run[m] for run in runs) for m, _ in COLUMNS.values()}
        if own:
            starts = {key[2]: points[0] for key, points in own.items()}.values()
            base = {m: mean_error(point.get(m) for point in starts) for m, _ in COLUMNS.values()}
            base["reward_at_samples"] = mean_error(point["reward"] for point in starts)
            found[reward]["base"] = base
    return found


def best(summary: dict, measure: str, better=max) -> str | None:
    """Returns the method with the best mean, or None if nothing was measured."""
    found = {name: row[measure]["mean"] for name, row in summary.items() if name != "base" and row[measure]}
    return better(found, key=found.get) if found else None


def shown(value: dict | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.4g}" + ("" if value["stderr"] is None else f" ± {value['stderr']:.2g}")
