"""Rewards: `reward(images [B, 3, H, W] in [0, 1], prompts, metadata) -> scores [B]`, higher is better.

A reward is named in the config by a spec:

    "hps"                                   one of REWARDS (registry.py)
    "hps:1.0,aesthetic:0.1"                 a weighted sum
    "my_package.my_module:my_reward"        your own function, module or class, importable from the current directory
    "my_module:my_reward:0.5,clip:10"       your own reward with a weight, in a sum
    "process:PATH/TO/python::my_module:my_reward"    the same in a process of its own (process.py)

Each name below is imported when it is first used, so importing the package does not load torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "build": ("as_reward", "build_reward", "parse_spec"),
    "base": ("Reward", "check_rewards", "require_differentiable"),
    "combine": ("WeightedReward", "try_reward"),
    "errors": ("RewardError", "UserError"),
    "registry": ("REWARDS", "options_name", "options_of", "reward_class"),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"rewards.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
