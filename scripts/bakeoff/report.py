"""Writes the results of the runs: a table for each reward, the claims, results.json and the figures."""

import json
import math
from pathlib import Path

from alignprop.runs.tracking import MetricsLog
from scripts.bakeoff.claims import claims
from scripts.bakeoff.figures import draw
from scripts.bakeoff.summary import COLUMNS, best, shown, summarise


def table(summary: dict, budget) -> str:
    """Returns one reward's methods as a Markdown table, with the best value of each column in bold."""
    measured = {title: m for title, m in COLUMNS.items() if any(row[m[0]] for row in summary.values())}
    titles = [title.format(samples=budget.samples, seconds=budget.seconds) for title in measured]
    lines = ["| method | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for method in sorted(summary, key=lambda name: name != "base"):
        cells = []
        for measure, better in measured.values():
            value, leader = summary[method][measure], better and best(summary, measure, better)
            is_best = leader and method != "base" and value and value["mean"] == summary[leader][measure]["mean"]
            cells.append(f"**{shown(value)}**" if is_best else shown(value))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def busy_seconds(folder: Path) -> tuple[float, float]:
    """Returns the wall-clock seconds in which any process of the bake-off ran, and the sum over all processes."""
    spans = sorted((row["started"], row["started"] + row["seconds"]) for row in
                   MetricsLog(folder / "processes.jsonl").rows())  # fmt: skip
    busy, until = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy, sum(end - start for start, end in spans)


def write_report(folder: Path, curves: dict, budget) -> str:
    """Writes report.md, results.json and the figures into the folder. Returns the text of report.md."""
    summary = summarise(curves, budget)
    results = {"budget": vars(budget), "summary": summary, "claims": {}}
    parts = []
    for reward, methods in ((reward, methods) for reward, methods in summary.items() if methods):
        lines, results["claims"][reward] = claims(curves, budget, reward, methods)
        parts += [f"## {reward}", table(methods, budget), "\n".join(lines)]
    busy, processes = results["wall_seconds"], results["process_seconds"] = busy_seconds(folder)
    parts.append(f"{busy / 60:.1f} minutes of wall-clock time, {processes / 60:.1f} of all processes together")
    results["curves"] = [{"reward": r, "method": m, "seed": s, "points": p} for (r, m, s), p in curves.items() if p]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(folder, curves, summary, budget)
    return text
