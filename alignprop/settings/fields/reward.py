"""Fields of the reward and of the loss that is made of it; the options of each built-in reward."""

import os

from alignprop.settings.fields.field import ALIGN_PROP, TRAINING, Effect, Field, needs
from alignprop.settings.fields.rules import choice, number, optional, text
from alignprop.settings.fields.rules import option as option_rule
from rewards.registry import REWARDS, options_name, options_of

_TRAINED = (TRAINING, ALIGN_PROP)
TARGET = needs("loss = 'target' or 'ceiling'", lambda c: c.loss != "maximise")
SEVERAL = needs("several rewards in reward_fn", lambda c: "," in c.reward_fn)

LOSS = (
    Field(
        "reward_fn", "aesthetic", text(),
        "The reward: a built-in one (docs/rewards.md), your own as 'package.module:callable', or a sum such as "
        "'hps:1,aesthetic:0.1'.",
    ),
    Field(
        "eval_reward_fn", "", text(empty=True),
        "Further rewards that an evaluation measures and that are not trained, separated by commas.",
    ),
    Field(
        "loss", "maximise", choice("maximise", "target", "ceiling"),
        "The loss of a sample with reward r: -r, |r - loss_target|, or max(0, loss_target - r).", _TRAINED,
    ),
    Field(
        "loss_target", None, optional(number()), "The target or ceiling, in units of the reward.", (*_TRAINED, TARGET),
    ),
    Field(
        "reward_combine", "sum", choice("sum", "mean", "min"),
        "What several rewards become, each times its weight: their sum, their mean, or the smallest.", (SEVERAL,),
    ),
    Field(
        "reward_noise", 0.0, number(at_least=0),
        "Gaussian noise on the pictures that the reward sees in training, as a standard deviation in units of [0, 1]. "
        "A reward that collapses under it is being fooled.", _TRAINED,
    ),
    Field(
        "kl_coeff", 0.0, number(at_least=0),
        "Multiplies the mean squared difference of the denoiser's output to the base model's, which is added to the "
        "loss of a sample after loss_coeff and grad_scale. It costs one more network call with gradient and one "
        "without.", _TRAINED,
    ),
    Field(
        "grad_scale", 1.0, number(above=0),
        "Multiplies the loss of a sample. With loss_coeff it sets the size of gradients against max_grad_norm.",
        _TRAINED,
    ),
)  # fmt: skip


def _is_named(group: str) -> Effect:
    """Whether a configuration names a reward that has the options of this group."""
    rewards = [name for name in REWARDS if options_name(name) == group]
    where, reason = " or ".join(rewards), "it needs that reward in reward_fn or eval_reward_fn"
    measures_diversity = group == "clip"  # diversity is measured in the space of clip.model
    if measures_diversity:
        where, reason = f"{where} or eval_diversity = True", f"{reason}, or eval_diversity = True"

    def holds(c) -> bool:
        named = {part.strip().split(":")[0] for part in f"{c.reward_fn},{c.eval_reward_fn}".split(",")}
        return (measures_diversity and c.eval_diversity) or any(name in named for name in rewards)

    return Effect(where, holds, lambda c: reason)


def _from_the_hub(group: str, name: str, names: set[str]) -> tuple[Effect, ...]:
    """Where an option names a hub's repository or its revision: that these are asked at all.

    Args:
        names: all options of the group. That of a "head_revision" is "head_repo", "head" or, at last, "model"; the file
            beside a "head_repo" is "head_file" or "head".
    """
    stem = name.removesuffix("_repo").removesuffix("revision").rstrip("_")
    if not name.endswith(("_repo", "revision")):
        return ()
    file = next((other for other in (f"{stem}_file", stem) if other in names and f"{stem}_repo" in names), "")
    repo = next(other for other in (f"{stem}_repo", stem, "model") if other in names)
    effects = []
    if file:
        is_local = lambda c: os.path.isfile(os.path.expanduser(c[group][file] or ""))  # noqa: E731
        effects.append(needs(f"{group}.{file} in a repository, not a local file", lambda c: not is_local(c)))
    if name.endswith("revision"):
        is_folder = lambda c: os.path.isdir(os.path.expanduser(c[group][repo]))  # noqa: E731
        effects.append(needs(f"{group}.{repo} of the hub, not a local folder", lambda c: not is_folder(c)))
    return tuple(effects)


def _of_rewards() -> tuple[Field, ...]:
    """What the constructors of the built-in rewards take (rewards/registry.py)."""
    fields = {}
    for name in REWARDS:
        group, options = options_name(name), options_of(name)
        names = {option.name for option in options}
        for option in options:
            field, effects = f"{group}.{option.name}", (_is_named(group), *_from_the_hub(group, option.name, names))
            fields[field] = Field(field, option.default, option_rule(option), option.help, effects)
    return tuple(fields.values())


OPTIONS = _of_rewards()
