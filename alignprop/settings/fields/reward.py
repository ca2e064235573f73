"""The fields of the reward and of the loss that is computed from it, and the options of each built-in reward."""

import os

from ml_collections import ConfigDict

from alignprop.settings.fields.field import ALIGN_PROP, TRAINING, Effect, Field, needs
from alignprop.settings.fields.rules import QUANTIZED
from rewards.registry import REWARDS, options_name, options_of
from rewards.rules import choice, number, option_rule, optional, text

_TRAINED = (TRAINING, ALIGN_PROP)
TARGET = needs("loss = 'target' or 'ceiling'", lambda c: c.loss != "maximise")
SEVERAL = needs("several rewards in reward_fn", lambda c: "," in c.reward_fn)

LOSS = (
    Field(
        "reward_fn", "aesthetic", text(),
        "The reward that is trained on: a built-in one (docs/rewards.md), your own as 'package.module:callable', or a "
        "weighted sum such as 'hps:1,aesthetic:0.1'. With 'process:PATH/TO/python::' before its name a reward runs in "
        "another Python environment. Evaluations measure the reward, and 'guide' follows it.",
    ),
    Field(
        "eval_reward_fn", "", text(empty=True),
        "Further rewards, separated by commas, that evaluations measure and that are not trained on.",
    ),
    Field(
        "loss", "maximise", choice("maximise", "target", "ceiling"),
        "The loss of a sample with reward r. 'maximise' is -r, 'target' is |r - loss_target|, and 'ceiling' is "
        "max(0, loss_target - r).", _TRAINED,
    ),
    Field(
        "loss_target", None, optional(number()),
        "The target or the ceiling of the loss, in units of the reward. 'target' and 'ceiling' cannot use None.",
        (*_TRAINED, TARGET),
    ),
    Field(
        "quantize_rewards", "", QUANTIZED,
        "The format in which the frozen weights of the rewards and of the diversity measure are kept, as in "
        "pretrained.quantize. Scores then differ a little from those of the unquantised reward.",
    ),
    Field(
        "reward_combine", "sum", choice("sum", "mean", "min"),
        "How several rewards, each multiplied by its weight, are combined for a sample: 'sum' adds them, 'mean' "
        "divides the sum by their number, and 'min' takes the smallest one.", (SEVERAL,),
    ),
    Field(
        "reward_noise", 0.0, number(at_least=0),
        "The standard deviation of Gaussian noise that training adds to the pictures that the reward sees, which are "
        "in [0, 1]. A reward that collapses under this noise is being exploited.", _TRAINED,
    ),
    Field(
        "kl_coeff", 0.0, number(at_least=0),
        "The weight of a second term of the loss, the mean squared difference between the denoiser's output and the "
        "base model's. train.loss_coeff and grad_scale do not multiply this term. It costs one more network call with "
        "gradient and one without, and needs use_lora = True. 0 leaves it out.", _TRAINED,
    ),
    Field(
        "grad_scale", 1.0, number(above=0),
        "Multiplies the loss of a sample. Together with train.loss_coeff it sets the size of the gradient in relation "
        "to train.max_grad_norm.",
        _TRAINED,
    ),
)  # fmt: skip


def _is_named(group: str) -> Effect:
    """Returns the condition that a configuration names a reward that has the options of this group."""
    rewards = [name for name in REWARDS if options_name(name) == group]
    where, reason = " or ".join(rewards), "it needs that reward in reward_fn or eval_reward_fn"
    measures_diversity = group == "clip"  # diversity is measured in the space of clip.model
    if measures_diversity:
        where, reason = f"{where} or eval_diversity = True", f"{reason}, or eval_diversity = True"

    def holds(c: ConfigDict) -> bool:
        parts = f"{c.reward_fn},{c.eval_reward_fn}".split(",")
        named = {part.rpartition("::")[2].split(":")[0].strip() for part in parts}  # also in a process of its own
        return (measures_diversity and c.eval_diversity) or any(name in named for name in rewards)

    return Effect(where, holds, lambda c: reason)


def _from_the_hub(group: str, name: str, names: set[str]) -> tuple[Effect, ...]:
    """Returns the conditions under which an option that names a repository of the hub, or its revision, is used at all.

    Args:
        group: the group of the option.
        name: the option. A name of neither kind has no such conditions.
        names: all options of the group. The repository of "head_revision" is "head_repo", "head" or, failing these,
            "model". The file that belongs to "head_repo" is "head_file" or "head".
    """
    stem = name.removesuffix("_repo").removesuffix("revision").rstrip("_")
    if not name.endswith(("_repo", "revision")):
        return ()
    file = next((other for other in (f"{stem}_file", stem) if other in names and f"{stem}_repo" in names), "")
    repo = next(other for other in (f"{stem}_repo", stem, "model") if other in names)
    effects = []
    if file:

        def is_no_file(c: ConfigDict) -> bool:
            return not os.path.isfile(os.path.expanduser(c[group][file] or ""))

        effects.append(needs(f"{group}.{file} in a repository, not a local file", is_no_file))
    if name.endswith("revision"):

        def is_no_folder(c: ConfigDict) -> bool:
            named = c[group][repo] or ""
            return bool(named) and not os.path.isdir(os.path.expanduser(named))

        effects.append(needs(f"{group}.{repo} of the hub, not a local folder", is_no_folder))
    return tuple(effects)


def _of_rewards() -> tuple[Field, ...]:
    """Returns the fields of the arguments of the built-in rewards' constructors (rewards/registry.py)."""
    fields = {}
    for name in REWARDS:
        group, options = options_name(name), options_of(name)
        names = {option.name for option in options}
        for option in options:
            field, effects = f"{group}.{option.name}", (_is_named(group), *_from_the_hub(group, option.name, names))
            fields[field] = Field(field, option.default, option_rule(option), option.help, effects)
    return tuple(fields.values())


OPTIONS = _of_rewards()
