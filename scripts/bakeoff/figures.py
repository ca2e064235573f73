"""Draws the figures: reward against samples and against seconds, and bars of obedience and diversity."""

import statistics
from pathlib import Path

# The colour and the marker of each method.
STYLES = {
    "full": ("#1f77b4", "o"), "truncated": ("#ff7f0e", "s"), "randomized": ("#d62728", "D"),
    "per_step": ("#e377c2", "v"), "draft_lv": ("#bcbd22", "^"), "refl": ("#8c564b", "<"), "drtune": ("#2ca02c", ">"),
    "sparse": ("#17becf", "p"), "bridge": ("#00429d", "P"), "lagrange": ("#9467bd", "X"),
    "leapalign": ("#e6ab02", "*"), "ddpo": ("#000000", "h"),
}  # fmt: skip
OTHER = ("#7f7f7f", ".")
AXES = {"samples": "samples of training", "seconds": "processor seconds of training"}


def mean_curve(curves: dict, reward: str, method: str) -> list[dict]:
    """Returns the mean over the seeds, at each evaluation that all of them have."""
    runs = [points for (r, m, _), points in curves.items() if (r, m) == (reward, method) and points]
    keys = ("samples", "seconds", "reward")
    return [{k: statistics.fmean(p[k] for p in points) for k in keys} for points in zip(*runs, strict=False)]


def draw(folder: Path, curves: dict, summary: dict, budget) -> None:
    """Writes bakeoff_samples.png, bakeoff_seconds.png (a panel per reward) and bakeoff_quality.png (two per reward)."""
    rewards = [reward for reward, methods in summary.items() if methods]
    if not rewards:
        return
    for axis in AXES:
        figure, panels = _figure(1, len(rewards))
        for panel, reward in zip(panels, rewards, strict=True):
            _draw_curves(panel, curves, reward, summary[reward], axis, getattr(budget, axis))
        figure.savefig(folder / f"bakeoff_{axis}.png", dpi=110)
    figure, panels = _figure(len(rewards), 2)
    for row, reward in enumerate(rewards):
        for panel, measure in zip(panels[2 * row : 2 * row + 2], ("obedience", "diversity"), strict=True):
            _draw_bars(panel, summary[reward], measure)
            panel.set_title(f"{reward}: held-out {measure} at {budget.samples} samples")
    figure.savefig(folder / "bakeoff_quality.png", dpi=110)


def _figure(rows: int, columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def _draw_curves(panel, curves, reward, methods, axis, budget) -> None:
    """Draws curves on a logarithmic axis, because DDPO's budget is much longer.

    The legend is in the order of the rewards at the budget.
    """
    score = lambda m: (methods[m][f"reward_at_{axis}"] or {"mean": float("-inf")})["mean"]  # noqa: E731
    for method in sorted((m for m in methods if m != "base"), key=score, reverse=True):
        points = mean_curve(curves, reward, method)[1:]
        colour, marker = STYLES.get(method, OTHER)
        style = {"color": colour, "marker": marker, "linewidth": 2.4 if method == "ddpo" else 1.5}
        panel.plot([p[axis] for p in points], [p["reward"] for p in points], label=method, markersize=5, **style)
    panel.axhline(methods["base"]["reward_at_samples"]["mean"], color="grey", linestyle=":", label="base model")
    panel.axvline(budget, color="grey", linewidth=0.8, alpha=0.6)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set(xlabel=AXES[axis], ylabel="held-out reward", title=reward)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_bars(panel, methods, measure) -> None:
    names = [m for m in methods if m != "base" and methods[m][measure]]
    means = [methods[m][measure]["mean"] for m in names]
    errors = [methods[m][measure]["stderr"] or 0 for m in names]
    colours = [STYLES.get(m, OTHER)[0] for m in names[::-1]]
    panel.barh(names[::-1], means[::-1], xerr=errors[::-1], color=colours, capsize=3)
    if methods["base"][measure]:
        panel.axvline(methods["base"][measure]["mean"], color="grey", linestyle=":")
    panel.set(xlabel=f"{measure}; dotted: base model")
