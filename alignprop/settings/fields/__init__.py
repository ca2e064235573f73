"""Every field of the configuration, with its default, its allowed values, its help and when it has an effect.

A new field needs one entry in the file of its group, and the code that reads the field.
"""

from alignprop.settings.fields import evaluation, memory, methods, model, reward, run, sampling, training
from alignprop.settings.fields.field import Field

GROUPS: dict[str, tuple[Field, ...]] = {
    "The run": run.FIELDS,
    "The model": model.FIELDS,
    "Sampling": sampling.SAMPLING,
    "The estimator": sampling.ESTIMATOR,
    "The reward and the loss": reward.LOSS,
    "Options of the built-in rewards": reward.OPTIONS,
    "Prompts and evaluation": evaluation.FIELDS,
    "Reward guidance without training": methods.GUIDANCE,
    "Policy gradient": methods.POLICY_GRADIENT,
    "Memory": memory.FIELDS,
    "Training": training.FIELDS,
}
FIELDS: dict[str, Field] = {field.name: field for group in GROUPS.values() for field in group}

# Users do not set these fields: the preset's name, the command line, and the values that `settings.resolve` derives.
DERIVED = ("preset", "command", "train.gradient_accumulation_steps", "train.steps_per_epoch")
