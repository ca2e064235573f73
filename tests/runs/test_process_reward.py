"""Training on a reward in a process of its own, beside training on the same reward in this process."""

import os
import signal
import sys

import pytest
import torch

from alignprop.runs.checkpoint import checkpoints_of
from alignprop.runs.manifest import damage_of
from alignprop.trainer import AlignPropTrainer
from rewards import RewardError
from tests.helpers.training import rows, train, weights

HERE = f"process:{sys.executable}::"
CONTRAST, REDNESS = (f"tests.helpers.toy_rewards:{name}" for name in ("contrast", "redness"))


@pytest.fixture
def config(toy_config):
    """Called with what stands before the name of a reward: 3 steps of 6 samples, on that reward and another one."""

    def make(prefix=HERE, **fields):
        return toy_config(
            run_name="there" if prefix else "here", reward_fn=f"{prefix}{CONTRAST}:0.7,{REDNESS}:-0.3", num_epochs=3,
            eval_freq=1, save_freq=1, per_gpu_capacity=3, train__total_batch_size=6, train__total_samples_per_epoch=6,
            **{"eval_reward_fn": "", **fields},
        )  # fmt: skip

    return make


@pytest.fixture
def here(config):
    """The run in this process."""
    return train(config("", eval_reward_fn="colour"))


def kill_before(trainer, steps):
    """Kills the process of the reward before each of these steps."""
    step = trainer.step

    def killing():
        if trainer.global_step + 1 in steps:
            os.kill(trainer.run.reward.terms[HERE + CONTRAST].worker._process.pid, signal.SIGKILL)
        return step()

    trainer.step = killing


def without_prefix(rows):
    names = lambda row: {name.removeprefix(HERE): value for name, value in row["rewards"].items()}  # noqa: E731
    return [{**row, "rewards": names(row)} for row in rows]


def test_the_scores_and_the_lora_have_the_same_bits_though_the_process_is_killed(config, here, capfd):
    trainer = AlignPropTrainer(config(eval_reward_fn=f"{HERE}colour"))
    kill_before(trainer, [2])
    trainer.train()
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and f"'{HERE}{CONTRAST}': its process ended with exit status -9 (Killed)" in warnings[0]
    assert torch.equal(weights(trainer), weights(here)) and weights(here).any()
    assert without_prefix(rows(trainer)) == rows(here)


def test_a_second_death_ends_the_run_in_one_line_and_keeps_its_checkpoints(config, here):
    trainer = AlignPropTrainer(config())
    kill_before(trainer, [2, 3])
    with pytest.raises(RewardError, match=rf"^reward '{HERE}{CONTRAST}': its process ended with exit status -9") as end:
        trainer.train()
    assert "\n" not in str(end.value)
    kept = checkpoints_of(trainer.run.folder)
    assert [path.name for path in kept] == ["checkpoint_1", "checkpoint_2"] and not any(map(damage_of, kept))
    assert torch.equal(weights(train(config(resume_from="latest"))), weights(here))
