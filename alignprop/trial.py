"""Trial steps on a GPU, by which training finds a memory policy that fits before it starts."""

from collections.abc import Callable

import torch

from alignprop.engine.optimizers import STATE_BYTES
from alignprop.memory.checkpointing import apply_policy
from alignprop.memory.planner import next_choice
from alignprop.run import Run
from alignprop.weights import TrainedWeights


def use_policy_that_fits(run: Run, weights: TrainedWeights, largest_batch: Callable[[], None]) -> None:
    """Makes trial steps until the memory policy of `run` fits. After each failure it takes the next more frugal choice.

    Args:
        largest_batch: computes a micro-batch as a step may have it that needs much memory. The trial steps leave no
            gradient behind.

    Raises:
        ConfigError: no allowed choice fits.
    """
    while reason := _out_of_memory(run, weights, largest_batch):
        choice = next_choice(run.config, run.accelerator.num_processes, run.choice, reason)
        run.say(
            f"memory_policy {run.choice.policy!r} with {run.choice.capacity} samples does not fit ({reason}); "
            f"trying {choice.policy!r}"
        )
        run.use(choice)
        apply_policy(run.model, choice.memory)


def _out_of_memory(run: Run, weights: TrainedWeights, largest_batch: Callable[[], None]) -> str:
    """Returns why a process ran out of memory in a trial step, or "" if the step fits on every process."""
    error_text, moments = "", []
    try:
        # The optimizer will keep a state for each parameter, mostly two moments in float32.
        size = STATE_BYTES.get(run.config.train.optimizer, 8)
        for p in weights.parameters:
            moments.append(torch.empty(p.numel() * size, dtype=torch.uint8, device=p.device))
        with run.residency("measure"):  # an evaluation also needs these modules on the device
            pass
        largest_batch()
    except torch.OutOfMemoryError as error:
        error_text = str(error).partition(". ")[0]
    moments.clear()
    weights.zero_grad()
    run.rollout.adjoint_norms.take()
    torch.cuda.empty_cache()  # memory that this policy leaves cached must not count for the next one
    return (error_text or "another process ran out of memory") if run.any_process(bool(error_text)) else ""
