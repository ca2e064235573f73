"""The curves of a report: one SVG for each panel, so that a narrow window can show them below each other."""

import io
from collections.abc import Sequence

from alignprop.evaluation.report.verdict import Point
from alignprop.evaluation.stop_when import MEASURES

TRAINED, UNTRAINED, OTHER = "#c2410c", "#1d4ed8", "#475569"


def curves(
    points: Sequence[Point], trained: Sequence[str], untrained: Sequence[str], marks: dict[str, int | None]
) -> list[str]:
    """Returns the panels of a run as SVG text: a curve for each score and measure over the optimizer steps.

    Args:
        points: the evaluations.
        trained, untrained: the names of the scores, which decide the colours.
        marks: steps that every panel marks by a vertical line, by what they are.
    """
    names = list(dict.fromkeys(["reward", *trained, *untrained, *points[-1].scores]))
    if len(trained) == 1:
        names.remove(trained[0])  # it is the reward itself, but for a factor
    named = [
        (_title(name, trained, untrained), [_mean(point, name) for point in points], _colour(name, trained, untrained))
        for name in names
    ]
    for name in MEASURES:
        values = [point.measures.get(name) for point in points]
        if None not in values:
            named.append((name.replace("_", " "), [(value, 0.0) for value in values], OTHER))
    return [_panel(title, [point.step for point in points], *panel, marks) for title, *panel in named]


def _panel(title: str, steps: list[int], values: list[tuple[float, float]], colour: str, marks: dict) -> str:
    from matplotlib.figure import Figure  # Figure draws with Agg, whatever the user's backend is.

    figure = Figure(figsize=(3.6, 2.5))  # with fixed margins, because finding them means to draw everything twice
    axis = figure.add_axes((0.19, 0.18, 0.78, 0.7))
    means, errors = zip(*values, strict=True)
    axis.errorbar(steps, means, yerr=errors, marker="o", markersize=3, capsize=2, color=colour)
    for name, step in marks.items():
        if step is not None:
            axis.axvline(step, color="#16a34a" if name == "best" else "#dc2626", linestyle=":", linewidth=1.5)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.set_title(title, color=colour, fontsize=10)
    axis.set_xlabel("optimizer step", fontsize=8)
    return _svg(figure)


def _mean(point: Point, name: str) -> tuple[float, float]:
    scores = point.scores[name]
    return scores.mean().item(), (scores.std() / len(scores) ** 0.5).item() if len(scores) > 1 else 0.0


def _colour(name: str, trained: Sequence[str], untrained: Sequence[str]) -> str:
    return TRAINED if name in ("reward", *trained) else UNTRAINED if name in untrained else OTHER


def _title(name: str, trained: Sequence[str], untrained: Sequence[str]) -> str:
    short = name.rpartition(":")[2]
    if name in ("reward", *trained):
        return f"{short} (trained)"
    return f"{short} (not trained)" if name in untrained else short


def _svg(figure) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
