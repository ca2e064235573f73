"""Reward backpropagation for text-to-image diffusion models.

    from alignprop import AlignPropTrainer, get_config

    AlignPropTrainer(get_config("aesthetic"), reward_function=my_reward, prompt_function=my_prompts).train()

Each name below is imported when it is used, so importing the package loads neither torch nor a model library.
"""

from importlib import import_module
from typing import Any

_HOMES = {  # the module of each name, and the name in that module
    "AlignPropTrainer": ("alignprop.trainer", "AlignPropTrainer"),
    "DDPOTrainer": ("alignprop.ddpo", "DDPOTrainer"),
    "get_config": ("config.align_prop", "get_config"),
    "get_ddpo_config": ("config.ddpo", "get_config"),
    "ConfigError": ("alignprop.settings.errors", "ConfigError"),
    "RewardError": ("rewards", "RewardError"),
    "plain_endings": ("alignprop.engine.stopping", "plain_endings"),
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own_name = _HOMES[name]
    return getattr(import_module(module), own_name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
