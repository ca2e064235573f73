"""What an alignment did, in plain words: whether the pictures got better, or only the trained reward rose.

The words come from paired differences. Picture j of every evaluation has the same prompt and the same noise, so two
evaluations are compared picture by picture. Pictures of one prompt are alike. So the differences are averaged for each
prompt first, and the standard error is taken over the prompts. With a single prompt it is taken over the pictures. A
change counts if it is larger than `CERTAIN` standard errors, or than Student's t of the same probability if there are
few of them.

A judge is a score that was measured and not trained. A judge has turned at the first evaluation from which on all are
certainly below that judge's best one. The run has turned when its first judge has. The best step is then the one before
that which the judges like most together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from alignprop.evaluation.judges import rows_by
from alignprop.evaluation.looks import LOOKS

CERTAIN = 3.0  # The best evaluation is chosen after looking at all of them, so two standard errors would be too few.
ALIKE = 0.5  # Diversity below this share of its first value is worth a remark,
DRIFT = 0.25  # and so is a change of a look by more than this share.


class Change(NamedTuple):
    """The mean of `count` paired differences, and its standard error."""

    mean: float
    error: float
    count: int

    @property
    def rose(self) -> bool:
        return self.mean > self.within(CERTAIN)

    @property
    def fell(self) -> bool:
        return -self.mean > self.within(CERTAIN)

    def within(self, deviations: float) -> float:
        """Returns half the width of the interval that a normal distribution has within so many standard deviations."""
        return student(deviations, self.count - 1) * self.error if self.count > 1 else math.inf


def student(z: float, freedom: int) -> float:
    """Returns the quantile of Student's t that has the probability of z (Abramowitz and Stegun, 26.7.5)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def change(before: torch.Tensor, after: torch.Tensor, prompts: Sequence[str]) -> Change:
    """Returns the change of scores [n] of the same n pictures."""
    differences = after - before
    if not differences.isfinite().all():
        return Change(math.nan, math.inf, len(differences))
    groups = [differences[rows].mean() for rows in rows_by(prompts).values()]
    means = torch.stack(groups) if len(groups) > 1 else differences
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.inf
    return Change(means.mean().item(), error, len(means))


@dataclass(frozen=True)
class Point:
    """An evaluation of a run.

    Attributes:
        step: the optimizer step.
        prompts: the prompts of the n pictures.
        scores: the scores of the n pictures, float64 [n], by name. "reward" is the one that is trained for.
        measures: the measures of all pictures together, such as "diversity".
    """

    step: int
    prompts: list[str]
    scores: Mapping[str, torch.Tensor]
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What the evaluations of a run say.

    Attributes:
        kind: "better", "kept" (the judges stayed as they were), "hacked", "unmeasured", "fell", "still" (the reward
            did not change), "broken" (scores are not finite), or "early" (there are not two evaluations).
        sentence: the verdict in one line.
        best: the step whose pictures the judges like most; None without such judges.
        turned: the step from which on a judge stays below its best; None if none does.
        remarks: sentences about drifts that no judge may have seen.
        advice: sentences that say what to try.
    """

    kind: str
    sentence: str
    best: int | None = None
    turned: int | None = None
    remarks: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def judge(points: Sequence[Point], untrained: Sequence[str]) -> Verdict:
    """Returns the verdict about a run.

    Args:
        points: the evaluations, oldest first, all of the same pictures.
        untrained: the names of the scores that were measured and not trained.
    """
    if len(points) < 2:
        return Verdict("early", "There is no second evaluation yet to compare the first one with.")
    first, last = points[0], points[-1]
    broken = [name for name in ("reward", *untrained) if not last.scores[name].isfinite().all()]
    if broken:
        sentence = f"At step {last.step} {listed(broken)} is not finite for some pictures: the run has diverged."
        return Verdict("broken", sentence, advice=ADVICE["fell"])
    reward = change(first.scores["reward"], last.scores["reward"], last.prompts)
    moved, remarks = _moved(reward), drifts(first, last)
    together = index(points, untrained)
    if together is None:
        sentence = f"The trained reward {moved}, and nothing else was measured to tell whether the pictures got better."
        return Verdict("unmeasured", sentence, remarks=remarks, advice=ADVICE["unmeasured"])
    turns = {name: place for name in untrained if (place := turning_point(points, name)) is not None}
    turned = min(turns.values(), default=None)
    best = _best(together[:turned])
    if turned is not None:
        kind, link = "fell" if reward.fell else "hacked", "but" if reward.rose else "and"
        sentence = (
            f"The trained reward {moved}, {link} what was not trained ({listed(turns)}) fell from step "
            f"{points[turned].step}. The pictures were best at step {points[best].step}."
        )
    elif reward.fell:
        kind, sentence = "fell", f"The trained reward fell. What was not trained ({listed(untrained)}) did not."
    elif not reward.rose:
        kind, sentence = "still", "The trained reward did not change by more than chance would explain."
    else:
        kind = "better" if change(together[0], together[-1], last.prompts).rose else "kept"
        how = _with_it(first, last, untrained) if kind == "better" else f"({listed(untrained)}) stayed as it was"
        sentence = f"The trained reward rose, and what was not trained {how}."
    step = None if turned is None else points[turned].step
    return Verdict(kind, sentence, points[best].step, step, remarks, ADVICE[kind])


def _with_it(first: Point, last: Point, untrained: Sequence[str]) -> str:
    """Says which judges rose, of those that rose together."""
    rose = [name for name in untrained if change(first.scores[name], last.scores[name], last.prompts).rose]
    others = [name for name in untrained if name not in rose]  # none of which has turned
    if not rose or not others:
        return f"({listed(untrained)}) rose with it" + ("" if rose else ", taken together")
    return f"rose with it ({listed(rose)}) or ended near its best ({listed(others)})"


def index(points: Sequence[Point], names: Sequence[str]) -> torch.Tensor | None:
    """Returns the mean of the named scores on one scale, [evaluations, n]; None if none of them varies."""
    columns = []
    for name in names:
        scores = torch.stack([point.scores[name] for point in points])
        deviation = scores[scores.isfinite()].std()
        if deviation > 0:
            columns.append(scores / deviation)
    return torch.stack(columns).mean(dim=0) if columns else None


def _best(scores: torch.Tensor) -> int:
    """Returns the place of the evaluation with the highest mean of scores [evaluations, n]. NaN is below all others."""
    return int(scores.mean(dim=1).nan_to_num(-math.inf).argmax())


def turning_point(points: Sequence[Point], name: str) -> int | None:
    """Returns the place of the first evaluation from which on all scores of a judge are certainly below its best ones.

    None: there is no such evaluation, because the last one is not below.
    """
    scores = torch.stack([point.scores[name] for point in points])
    best, turned = _best(scores), None
    for place in range(len(points) - 1, best, -1):
        if not change(scores[best], scores[place], points[-1].prompts).fell:
            break
        turned = place
    return turned


def drifts(first: Point, last: Point) -> list[str]:
    """Returns a sentence for each measure that changed much between two evaluations."""
    found = []
    before, after = (point.measures.get("diversity") for point in (first, last))
    if before and after is not None and after < ALIKE * before:
        found.append(
            f"Pictures of the same prompt became more alike: the diversity fell from {before:.3g} to {after:.3g}."
        )
    for name in LOOKS:
        if name not in first.scores or name not in last.scores:
            continue
        moved = change(first.scores[name], last.scores[name], last.prompts)
        start = first.scores[name].mean().item()
        if start and (moved.rose or moved.fell) and abs(moved.mean) > DRIFT * start:
            found.append(f"The {name} of the pictures {_moved(moved)} by {abs(moved.mean) / start:.0%}.")
    return found


def listed(names: Iterable[str]) -> str:
    """Returns names for a sentence. Of a user's own reward only the last part is named."""
    short = [name.rpartition(":")[2] for name in names]
    return " and ".join(filter(None, [", ".join(short[:-1]), short[-1]]))


def _moved(found: Change) -> str:
    return "rose" if found.rose else "fell" if found.fell else "did not change"


ADVICE = {
    "hacked": [
        "Use the checkpoint of the best step, or one before it.",
        "Next time, let the run keep it: best_by names the measure that decides, and stop_when ends the run.",
        "Add the judge to the reward, for example reward_fn='aesthetic:1,clip:40', or set kl_coeff above 0.",
        "Lower train.learning_rate, or mix the checkpoint with the base model (evaluate_soup, lora_scale).",
    ],
    "better": ["Train longer: the judges had not turned when the run ended."],
    "kept": [
        "The pictures got what the reward asks for at no cost that these judges see. Look at them before you trust it.",
        "Add judges to eval_reward_fn that know more about your pictures.",
    ],
    "unmeasured": ["Set eval_reward_fn to rewards that are not trained, such as 'clip' or 'pickscore'."],
    "fell": ["Lower train.learning_rate. If updates were skipped, see docs/troubleshooting.md."],
    "still": [
        "Train longer, or raise train.learning_rate.",
        "Evaluate on more prompts (num_eval_prompts, num_eval_images), so that small changes can be told from chance.",
    ],
}
