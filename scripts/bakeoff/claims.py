"""Answers the bake-off's questions: how many fewer samples than DDPO, does random truncation pay, what is best."""

import math

from scripts.bakeoff.curves import mean_error, samples_to_reach
from scripts.bakeoff.summary import best, shown, values

FEWER = 25  # times fewer samples than DDPO


def against_ddpo(curves: dict, reward: str, method: str) -> list[dict]:
    """Returns, for each seed that both have, the samples with which `method` reaches DDPO's highest held-out reward.

    DDPO's highest reward is its last one, unless the run collapses. `ratio` is DDPO's samples up to that reward,
    divided by the samples of `method`. It has no interpolation, so it is a lower bound, no finer than the evaluations.
    `interpolated` is the same with interpolation. Both are None if `method` did not reach the reward, or if DDPO was
    never higher than at its start.
    """
    found = []
    for (r, m, seed), points in curves.items():
        ddpo = curves.get((reward, "ddpo", seed))
        if (r, m) != (reward, method) or not points or not ddpo or not ddpo[-1]["samples"]:
            continue
        top = max(ddpo, key=lambda point: point["reward"])
        gained = top["reward"] > ddpo[0]["reward"]
        reached = samples_to_reach(points, top["reward"]) if gained else None
        found.append({
            "seed": seed, "ddpo_samples": top["samples"], "start": ddpo[0]["reward"], "target": top["reward"],
            "samples": reached and reached[0], "ratio": reached and top["samples"] / reached[0],
            "interpolated": reached and top["samples"] / reached[1], "ddpo_gained": gained,
            "ddpo_end": ddpo[-1]["reward"],
        })  # fmt: skip
    return found


def differences(curves: dict, budget, reward: str, method: str, other: str) -> dict:
    """Returns the reward of `method` minus that of `other`, paired by seed, at each budget."""
    runs = {(m, s): values(points, budget) for (r, m, s), points in curves.items() if r == reward and points}
    seeds = [s for m, s in runs if m == method and (other, s) in runs]
    found = {}
    for measure in ("reward_at_samples", "reward_at_seconds"):
        pairs = [(runs[method, s][measure], runs[other, s][measure]) for s in seeds]
        found[measure] = mean_error(a - b for a, b in pairs if None not in (a, b))
    return found


def claims(curves: dict, budget, reward: str, summary: dict) -> tuple[list[str], dict]:
    """Returns (lines to read, the same as numbers) for one reward."""
    lines, numbers = [], {"against_ddpo": {}, "randomized_minus": {}, "best": {}}
    estimators = {method: row for method, row in summary.items() if method not in ("ddpo", "base")}
    leader = best(estimators, "reward_at_samples")
    for method in dict.fromkeys(["randomized", leader]):
        seeds = numbers["against_ddpo"][method] = against_ddpo(curves, reward, method)
        lines += [f"- (a) {method}, seed {row['seed']}: {_told(row)}" for row in seeds]
        if seeds:
            held = all(row["ratio"] is not None and row["ratio"] >= FEWER for row in seeds)
            lines.append(
                f"- (a) {method}: at least {FEWER} times fewer samples with every seed: {'yes' if held else 'no'}"
            )
    for other in ("truncated", "full"):
        found = numbers["randomized_minus"][other] = differences(curves, budget, reward, "randomized", other)
        if not any(found.values()):
            continue
        lines.append(
            f"- (b) randomized - {other}, paired by seed: {shown(found['reward_at_samples'])} at {budget.samples} "
            f"samples, {shown(found['reward_at_seconds'])} at {budget.seconds:g} s"
        )
    for title in ("reward_at_samples", "reward_at_seconds", "rating", "obedience", "diversity"):
        name = best(estimators, title)
        if name:
            near = [m for m in estimators if m != name and _overlaps(estimators[m][title], estimators[name][title])]
            numbers["best"][title] = {"method": name, "not_told_apart": near}
            others = f"; within the standard errors: {', '.join(near)}" if near else ""
            lines.append(f"- (c) best {title.replace('_', ' ')}: {name} ({shown(estimators[name][title])}){others}")
    return lines, numbers


def _told(row: dict) -> str:
    goal = f"DDPO's {row['target']:.4g} after {row['ddpo_samples']} samples, from {row['start']:.4g}"
    if row["ddpo_end"] < row["target"]:
        goal += f" (its end: {row['ddpo_end']:.4g})"
    if not row["ddpo_gained"]:
        return f"nothing to reach, DDPO was never higher than it began ({goal})"
    if row["ratio"] is None:
        return f"did not reach {goal}"
    return f"{row['samples']} samples to {goal}: {row['ratio']:.1f}× (interpolated {row['interpolated']:.1f}×)"


def _overlaps(a: dict | None, b: dict) -> bool:
    return bool(a) and abs(a["mean"] - b["mean"]) <= math.hypot(a["stderr"] or 0, b["stderr"] or 0)
