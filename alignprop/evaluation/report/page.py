"""Writes report.html: one page that needs no other file and no network.

The text is in page.html and comparison.html, templates for jinja2, which escapes prompts. This file fills in the facts.
"""

import base64
import io
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from alignprop.evaluation.judges import rows_by
from alignprop.evaluation.report.charts import curves
from alignprop.evaluation.report.source import RunData
from alignprop.evaluation.report.verdict import Point, Verdict, change, index, judge

SHOWN, ROWS, TIMES, EXTREMES = 12, 6, 8, 4  # pictures with a slider; prompts and evaluations over time; prompts listed
LARGE, SMALL = 512, 160  # pixels of the longer side of embedded pictures


def write_page(run: RunData) -> Verdict | None:
    """Writes report.html into a run folder.

    Returns:
        The verdict; None if the run has no evaluation, so that no page was written.
    """
    if not run.points:
        return None
    verdict = judge(run.points, run.untrained)
    first, last = run.points[0], run.points[-1]
    marks = {"best": verdict.best if verdict.turned is not None else None, "turned": verdict.turned}
    page = _template("page.html").render(
        name=run.folder.name,
        facts=_facts(run),
        verdict=verdict,
        kept=_kept(run, verdict),
        pairs=_pairs(run, first, last),
        times=_over_time(run),
        curves=[*map(Markup, curves(run.points, run.trained, run.untrained, marks))] if len(run.points) > 1 else [],
        table=_table(run, verdict),
        extremes=_extremes(run) if len(run.points) > 1 else {},
        steps=(first.step, last.step),
    )
    write_text(run.folder / "report.html", page)
    return verdict


def write_comparison(entries: Mapping[str, tuple[Point, list[Image.Image]]], path: Path) -> None:
    """Writes a page that compares evaluations of the same prompts with the first of them.

    Args:
        entries: the evaluations and their pictures, by name.
        path: the file to write.
    """
    (first, _), *_ = entries.values()
    alike = len({tuple(point.scores) for point, _ in entries.values()}) == 1  # else their rewards may differ
    names = [name for name in first.scores if all(name in point.scores for point, _ in entries.values())]
    names = [name for name in names if alike or name != "reward"]
    means = [[point.scores[name].mean().item() for point, _ in entries.values()] for name in names]
    changes = [
        [change(first.scores[name], p.scores[name], p.prompts) if p is not first else None for p, _ in entries.values()]
        for name in names
    ]
    rows = [[*zip(*pair, strict=True)] for pair in zip(means, changes, strict=True)]
    count = min(SHOWN, *(len(pictures) for _, pictures in entries.values()))
    pictures = [
        (first.prompts[j], [embedded(pictures[j], LARGE) for _, pictures in entries.values()]) for j in range(count)
    ]
    page = _template("comparison.html").render(
        names=list(entries), table=zip(names, rows, strict=True), pictures=pictures, count=len(first.prompts)
    )
    write_text(path, page)


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all, so that a browser never shows half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def embedded(picture: Image.Image, longest: int) -> Markup:
    """Returns a picture as the text of an image's source, no larger than `longest` pixels."""
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=92, subsampling=0)
    return Markup("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode())


@cache
def _template(name: str) -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["number"] = lambda value: f"{value:.4g}"
    environment.filters["signed"] = lambda value: f"{value:+.3g}"
    return environment.get_template(name)


def _facts(run: RunData) -> dict[str, str]:
    c = run.config
    facts = {
        "model": c["pretrained"]["model"],
        "trained reward": c["reward_fn"],
        "only measured": c["eval_reward_fn"],
        "pictures in an evaluation": f"{len(run.points[-1].prompts)}, of {len(set(run.points[-1].prompts))} prompts",
        "command": c.get("command"),
    }
    return {name: value for name, value in facts.items() if value}


def _kept(run: RunData, verdict: Verdict) -> str:
    """Returns a sentence about the checkpoint of the best step; empty if nothing turned."""
    if verdict.turned is None or verdict.best is None:
        return ""
    if not verdict.best:
        return "The base model was better than the last checkpoint."
    saved = [step for step in run.checkpoints if step <= verdict.best]
    if not saved:
        return "No checkpoint of that step or before it is kept."
    exact = "" if saved[-1] == verdict.best else ", the last one before that step"
    return f"checkpoints/checkpoint_{saved[-1]} is kept{exact}."


def _pairs(run: RunData, first: Point, last: Point) -> list[dict]:
    before, after = run.pictures(first.step), run.pictures(last.step)
    if [picture.size for picture in before] != [picture.size for picture in after]:
        return []
    return [
        {
            "prompt": last.prompts[j],
            "before": embedded(before[j], LARGE),
            "after": embedded(after[j], LARGE),
            "rewards": (first.scores["reward"][j].item(), last.scores["reward"][j].item()),
            "ratio": f"{before[j].width} / {before[j].height}",
        }
        for j in range(min(len(before), SHOWN))
    ]


def _over_time(run: RunData) -> dict:
    """Returns the steps of some evaluations from first to last, and rows of the same pictures at these steps."""
    places = sorted({round(i) for i in torch.linspace(0, len(run.points) - 1, TIMES).tolist()})
    steps = [run.points[place].step for place in places]
    columns = [run.pictures(step)[:ROWS] for step in steps]
    rows = [
        (prompt, [embedded(picture, SMALL) for picture in pictures])
        for prompt, *pictures in zip(run.points[-1].prompts, *columns, strict=False)
    ]
    return {"steps": steps, "rows": rows}


def _table(run: RunData, verdict: Verdict) -> list[dict]:
    first, last = run.points[0], run.points[-1]
    best = next((point for point in run.points if point.step == verdict.best), None)
    rows = []
    for name in dict.fromkeys(["reward", *run.trained, *run.untrained, *last.scores]):
        role = "trained" if name in ("reward", *run.trained) else "not trained" if name in run.untrained else "look"
        means = [point.scores[name].mean().item() if point else None for point in (first, best, last)]
        moved = change(first.scores[name], last.scores[name], last.prompts)
        rows.append({"name": name, "role": role, "means": means, "change": moved})
    for name in first.measures:
        if name in last.measures:
            means = [point.measures.get(name) if point else None for point in (first, best, last)]
            rows.append({"name": name.replace("_", " "), "role": "all pictures", "means": means, "change": None})
    return rows


def _extremes(run: RunData) -> dict[str, list[tuple[str, float]]]:
    """Returns the prompts whose pictures gained the most and the least by the judges, or else by the reward."""
    names = run.untrained if index(run.points, run.untrained) is not None else ["reward"]
    scores = index(run.points, names)
    if scores is None:
        return {}
    gains = {
        prompt: (scores[-1][rows] - scores[0][rows]).mean().item()
        for prompt, rows in rows_by(run.points[-1].prompts).items()
    }
    ordered = sorted(gains.items(), key=lambda pair: pair[1])
    count = min(EXTREMES, len(ordered) // 2)
    return {"lost": ordered[:count], "gained": ordered[::-1][:count]} if count else {}
