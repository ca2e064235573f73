"""The results of an evaluation, and the files that people and reports read."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alignprop.evaluation.judges import rows_by
from alignprop.evaluation.pictures import Pictures, save_grid
from alignprop.settings.json_files import write_json


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation of n pictures.

    Attributes:
        prompts: the prompts of the n pictures.
        images: the first pictures, float [min(n, keep), 3, H, W] in [0, 1]; a list if the run has several sizes.
        rewards: the scores under the reward of interest, float64 [n].
        terms: the scores under each single reward, by its name, float64 [n].
        measures: the measures of all pictures together, as far as they were measured: "diversity"
            (evaluation/judges.py) and "base_distance" (method/base_distance.py).
        metadata: the metadata rows of the n prompts.
        looks: how the n pictures look, by the names of evaluation/looks.py, float64 [n].
        sizes: the sizes of the n pictures, such as "768x512"; empty if the run has only one size.
    """

    prompts: list[str]
    images: Pictures
    rewards: torch.Tensor
    terms: dict[str, torch.Tensor]
    measures: dict[str, float] = field(default_factory=dict)
    metadata: list[dict] = field(default_factory=list)
    looks: dict[str, torch.Tensor] = field(default_factory=dict)
    sizes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        """All scores by name, [n] each; the reward is included only if it does not equal one of the terms."""
        alone = any(torch.equal(self.rewards, scores) for scores in self.terms.values())
        return self.terms if alone else {"reward": self.rewards, **self.terms}

    def row(self) -> dict:
        """Returns the means as a row of metrics.jsonl."""
        by_size = {name: self.rewards[rows].mean().item() for name, rows in rows_by(self.sizes).items()}
        return {
            "kind": "eval",
            "reward": self.rewards.mean().item(),
            "reward_std": self.rewards.std(correction=0).item(),
            "rewards": {name: scores.mean().item() for name, scores in self.terms.items()},
            **({"reward_by_size": by_size} if by_size else {}),
            **self.measures,
            **({"looks": {name: values.mean().item() for name, values in self.looks.items()}} if self.looks else {}),
        }

    def labels(self) -> list[str]:
        """Returns a caption for each kept picture: its prompt, and below it a score.

        The score is the reward. If the reward is not one single score, it is that of the first single reward, with its
        name before it.
        """
        name, scores = next(iter(self.terms.items()))
        title = "" if torch.equal(self.rewards, scores) else name.rpartition(":")[2] + " "
        return [f"{p}\n{title}{r:.2f}" for p, r in zip(self.prompts[: len(self.images)], scores.tolist(), strict=False)]


def statistics(scores: torch.Tensor) -> dict[str, float]:
    """Returns the mean, the standard deviation and the standard error of the mean of scores [n], and n."""
    std = scores.std().item() if len(scores) > 1 else 0.0
    return {"mean": scores.mean().item(), "std": std, "stderr": std / math.sqrt(len(scores)), "n": len(scores)}


def write_scores(evaluation: Evaluation, path: Path) -> None:
    """Writes a CSV file with a row for each picture: its prompt, its size, its scores and its looks."""
    columns = {"reward": evaluation.rewards, **evaluation.looks, **evaluation.terms}  # a term may have a look's name
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", *(["size"] if evaluation.sizes else []), *columns])
        for j, prompt in enumerate(evaluation.prompts):
            values = [column[j].item() for column in columns.values()]
            writer.writerow([f"{j:06d}.png", prompt, *evaluation.sizes[j : j + 1], *values])


def write_report(evaluation: Evaluation, folder: Path) -> dict:
    """Writes scores.csv (a row per picture), summary.json and grid.png.

    summary.json has the statistics overall, per prompt, per size if there are several, and per tag if the metadata have
    the column "tag". With tags it also has the mean over the tags of their means, in which a tag with few pictures
    weighs as much as one with many. A picture without a tag is in none of these.

    Returns:
        The content of summary.json.
    """
    write_scores(evaluation, folder / "scores.csv")
    all_scores = {"reward": evaluation.rewards, **evaluation.terms}
    summary = {name: statistics(scores) for name, scores in all_scores.items()}
    summary |= evaluation.measures
    groups = {"per_prompt": evaluation.prompts, "per_size": evaluation.sizes, "per_tag": _tags(evaluation.metadata)}
    for group, values in groups.items():
        rows = {value: rows for value, rows in rows_by(values).items() if value}
        if rows:
            summary[group] = {
                value: {name: statistics(scores[those]) for name, scores in all_scores.items()}
                for value, those in rows.items()
            }
    if "per_tag" in summary:
        tags = summary["per_tag"].values()
        summary["mean_of_tags"] = {name: sum(tag[name]["mean"] for tag in tags) / len(tags) for name in all_scores}
    write_json(folder / "summary.json", summary)
    save_grid(evaluation.images, evaluation.labels(), folder / "grid.png")
    return summary


def _tags(metadata: list[dict]) -> list[str]:
    """Returns the tag of each row, empty for a row that has none."""
    tags = [row.get("tag") if isinstance(row, dict) else None for row in metadata]
    return ["" if tag is None else str(tag) for tag in tags]
