"""The optimizers that can train the weights, and the learning rate of each of their updates."""

import importlib.util
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from ml_collections import ConfigDict

from alignprop.engine.sharding import spread
from alignprop.settings.errors import ConfigError


def _adamw(p, t) -> torch.optim.Optimizer:
    betas, fused = (t.adam_beta1, t.adam_beta2), p[0].is_cuda or None
    return torch.optim.AdamW(p, t.learning_rate, betas, t.adam_epsilon, t.adam_weight_decay, fused=fused)


def _adamw8bit(p, t) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(p, t.learning_rate, (t.adam_beta1, t.adam_beta2), t.adam_epsilon, t.adam_weight_decay)


def _prodigy(p, t) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(
        p, t.learning_rate, (t.adam_beta1, t.adam_beta2), eps=t.adam_epsilon, weight_decay=t.adam_weight_decay,
        use_bias_correction=True, safeguard_warmup=True,  # its authors advise both for diffusion models
    )  # fmt: skip


# Each entry makes an optimizer from the trained parameters and `config.train`.
OPTIMIZERS = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "adafactor": lambda p, t: torch.optim.Adafactor(p, t.learning_rate, weight_decay=t.adam_weight_decay),
    "sgd": lambda p, t: torch.optim.SGD(p, t.learning_rate, weight_decay=t.adam_weight_decay),
}
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}  # the other optimizers are torch's
# The bytes of state for each trained number, of the optimizers that cannot run on tensors without data. AdamW8bit has
# two moments of one byte, except in small tensors, which matter little. Prodigy has four float32 tensors: two moments,
# the first weights, and a sum of gradients.
STATE_BYTES = {"adamw8bit": 2, "prodigy": 16}
# Prodigy keeps what it learns about its step size among its options.
LEARNED_OPTIONS = ("d", "d_max", "d_numerator", "k")


def check_package(optimizer: str) -> None:
    """Raises ConfigError if the package of the optimizer, the field `train.optimizer`, is not installed."""
    package = PACKAGES.get(optimizer)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"train.optimizer = {optimizer!r} needs the package {package}: pip install {package}")


def make_optimizer(parameters: list[torch.nn.Parameter], train: ConfigDict) -> torch.optim.Optimizer:
    """Makes the optimizer `train.optimizer`, or a stand-in if it cannot run on the parameters, which have no data.

    Args:
        parameters: the trained tensors.
        train: the fields `train` of the configuration.
    """
    if parameters[0].is_meta and train.optimizer in STATE_BYTES:
        return StateAlone(parameters, STATE_BYTES[train.optimizer])
    return OPTIMIZERS[train.optimizer](parameters, train)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, parameters: list[torch.nn.Parameter]) -> None:
    """Restores the state of an optimizer. Its options stay those of this run.

    Args:
        optimizer: the optimizer.
        state: its `state_dict()` when it was saved, with whole tensors. It is changed.
        parameters: the trained tensors.
    """
    for i, moments in state["state"].items():
        for name, moment in moments.items():
            # Scalars, such as the step count, are never sharded.
            if isinstance(moment, torch.Tensor) and moment.dim():
                moments[name] = spread(moment, parameters[i])
    # The options are set first, because loading places the optimizer's tensors according to them.
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved.update({k: v for k, v in own.items() if k not in ("params", *LEARNED_OPTIONS)})
    optimizer.load_state_dict(state)


class StateAlone(torch.optim.Optimizer):
    """An optimizer that allocates a state and updates nothing. The memory planner counts the state.

    Args:
        parameters: the trained tensors.
        size: the bytes of state for each number in the parameters.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], size: int):
        super().__init__(parameters, {})
        self.size = size

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p]["all"] = torch.empty(p.numel() * self.size, dtype=torch.uint8, device=p.device)


def learning_rates(train: ConfigDict, updates: int) -> Callable[[int], float]:
    """Returns the learning rate of an update as a function of the number of updates before it.

    The formulas are those of diffusers. A scheduler that counts its own steps is not used: what depends on the number
    of updates alone has no state to save, and cannot differ after a run was resumed.

    Args:
        train: the fields `train` of the configuration.
        updates: the number of updates in the whole run.
    """
    name = "constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule
    stand_in = torch.optim.SGD([torch.zeros(1)], train.learning_rate)  # diffusers asks an optimizer for its first rate
    scheduler = get_scheduler(
        name, stand_in, num_warmup_steps=train.lr_warmup_steps, num_training_steps=updates,
        num_cycles=train.lr_num_cycles, power=train.lr_power,
    )  # fmt: skip
    (factor,) = scheduler.lr_lambdas
    return lambda done: train.learning_rate * factor(done)
