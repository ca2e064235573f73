"""Fields of the reward and of the loss that is made of it; the options of each built-in reward."""

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


def _of_rewards() -> tuple[Field, ...]:
    """What the constructors of the built-in rewards take (rewards/registry.py)."""
    fields = {}
    for name in REWARDS:
        group = options_name(name)
        for option in options_of(name):
            field = f"{group}.{option.name}"
            fields[field] = Field(field, option.default, option_rule(option), option.help, (_is_named(group),))
    return tuple(fields.values())


OPTIONS = _of_rewards()
