"""The declaration of a field of the configuration, and the conditions under which it has an effect."""

from collections.abc import Callable
from dataclasses import dataclass

from ml_collections import ConfigDict

from rewards.rules import Rule


@dataclass(frozen=True)
class Effect:
    """A condition without which a field does nothing.

    Attributes:
        where: the condition as the documentation states it.
        holds: returns whether a configuration meets the condition.
        reason: returns why the field has no effect in a configuration that does not meet the condition.
        names: the estimators of which one must be chosen, if that is the condition.
    """

    where: str
    holds: Callable[[ConfigDict], bool]
    reason: Callable[[ConfigDict], str]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Field:
    """One field of the configuration. It is declared here and nowhere else.

    Attributes:
        name: the name with its group, as on the command line, for example "train.learning_rate".
        default: the value unless a preset or a user sets another one. None is derived later or left to the method.
        rule: the values that are allowed.
        help: the field's effect and its unit, in whole sentences.
        effects: the conditions without which the field does nothing. A user who sets it anyway gets a warning.
    """

    name: str
    default: object
    rule: Rule
    help: str
    effects: tuple[Effect, ...] = ()


def needs(where: str, holds: Callable[[ConfigDict], bool], names: tuple[str, ...] = ()) -> Effect:
    return Effect(where, holds, lambda c: f"it needs {where}", names)


TRAINING = Effect("training", lambda c: c.task == "train", lambda c: f"task = {c.task!r} does not train")
GRADIENTS = Effect("training or guidance", lambda c: c.task in ("train", "guide"), TRAINING.reason)
ALIGN_PROP = Effect(
    "algorithm = 'align_prop'",
    lambda c: c.task != "train" or c.algorithm != "ddpo",
    lambda c: "algorithm = 'ddpo' does not use it",
)
DDPO = needs("algorithm = 'ddpo'", lambda c: c.algorithm == "ddpo")
GUIDE = needs("task = 'guide'", lambda c: c.task == "guide")
SOUP = needs("task = 'evaluate_soup'", lambda c: c.task == "evaluate_soup")
MIXTURE = needs("task = 'evaluate_soup' or 'explore'", lambda c: c.task in ("evaluate_soup", "explore"))
EVALUATION = Effect(
    "training or an evaluation", lambda c: c.task != "explore", lambda c: "task = 'explore' shows single pictures"
)
AFTER_TRAINING = needs("task = 'evaluate' or 'guide'", lambda c: c.task in ("evaluate", "guide"))
LORA = needs("use_lora = True", lambda c: c.use_lora)
GUIDANCE = needs("guidance_scale > 1", lambda c: c.guidance_scale != 1)
CHECKPOINT = needs("resume_from", lambda c: bool(c.resume_from))


def estimator(*names: str) -> tuple[Effect, ...]:
    """Returns the conditions of a field that only these estimators use."""
    where = "estimator = " + " or ".join(map(repr, names))
    return TRAINING, ALIGN_PROP, needs(where, lambda c: c.estimator in names, names)
