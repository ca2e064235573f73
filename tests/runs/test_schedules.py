"""The learning rate of whole runs, in their rows and after they were resumed, and the optimizers of other packages."""

import math
import sys

import pytest
import torch

from alignprop.ddpo import DDPOTrainer
from alignprop.engine.stopping import STOPPED
from alignprop.settings.errors import ConfigError
from alignprop.trainer import AlignPropTrainer
from tests.helpers import eight_bit
from tests.helpers.toy_rewards import redness
from tests.helpers.training import asks_to_stop, rows, train, weights

RATE = 1e-2
# 8 updates, of which 3 are warm-up, and without an evaluation in between.
FIELDS = dict(
    train__learning_rate=RATE,
    train__lr_schedule="linear",
    train__lr_warmup_steps=3,
    num_epochs=4,
    estimator="truncated",
)
LINEAR = [0, 1 / 3, 2 / 3, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]


def rates(trainer):
    return [row["lr"] for row in rows(trainer, "train")]


def test_the_row_of_a_step_has_its_learning_rate(toy_config):
    trainer = AlignPropTrainer(toy_config(**FIELDS))
    found, sizes = [], []
    for _ in range(4):
        before = weights(trainer)
        found.append(trainer.step()["lr"])
        sizes.append((weights(trainer) - before).abs().max().item())
    assert found == pytest.approx([RATE * share for share in LINEAR[:4]])
    # A step of Adam is at most of the size of its learning rate, and of that size at first.
    assert sizes[0] == 0 < sizes[1] < sizes[3] and sizes[1] == pytest.approx(found[1], rel=0.3)


@pytest.mark.parametrize("stopped_after", [1, 2, 5])
def test_a_run_that_was_stopped_continues_on_its_schedule(toy_config, stopped_after):
    """In the warm-up and in the decay, in the middle of an epoch and between two."""
    whole = AlignPropTrainer(toy_config(run_name="whole", **FIELDS), reward_function=redness)
    whole.train()
    options = toy_config(run_name="parts", **FIELDS)
    # Call 0 is the trial. The evaluation at the start is 2 calls, and each step is 2.
    reward = asks_to_stop(1 + 2 + 2 * stopped_after - 1)
    with pytest.raises(SystemExit) as stopped:
        AlignPropTrainer(options, reward_function=reward).train()
    assert stopped.value.code == STOPPED
    parts = AlignPropTrainer(toy_config(run_name="parts", resume_from="latest", **FIELDS), reward_function=redness)
    assert parts.global_step == parts.weights.updates == stopped_after
    parts.train()
    assert torch.equal(weights(parts), weights(whole)) and rows(parts) == rows(whole)
    assert rates(parts) == pytest.approx([RATE * share for share in LINEAR])


def test_more_epochs_continue_on_the_schedule_of_the_new_length(toy_config):
    fields = {**FIELDS, "num_epochs": 2}
    half = train(toy_config(run_name="r", **fields))
    assert rates(half) == pytest.approx([0, RATE / 3, 2 * RATE / 3, RATE])
    longer = train(toy_config(resume_from=str(half.run.folder), **FIELDS))
    assert rates(longer) == pytest.approx([RATE * share for share in LINEAR])


def test_a_run_with_more_epochs_is_the_run_that_had_them_from_the_start(toy_config):
    """If the schedule does not depend on its length until then: after a warm-up, and in it."""
    fields = {**FIELDS, "train__lr_schedule": "constant"}
    whole = train(toy_config(run_name="whole", **fields))
    half = train(toy_config(run_name="half", **{**fields, "num_epochs": 2}))
    longer = train(toy_config(resume_from=str(half.run.folder), **fields))
    assert torch.equal(weights(longer), weights(whole)) and rates(longer) == rates(whole)


def test_a_skipped_update_counts(toy_config):
    """The schedule ends with the run, whatever was skipped, and a resumed run knows where it is."""
    trainer = AlignPropTrainer(toy_config(run_name="r", **FIELDS))
    trainer.run.open_folder(0)
    trainer.step()
    trainer.weights.update(torch.tensor([float("nan")]))
    trainer.global_step += 1
    assert (trainer.weights.skipped, trainer.weights.updates) == (1, 2)
    trainer.save()
    trainer.run.records.close()
    again = AlignPropTrainer(toy_config(run_name="r", resume_from="latest", **FIELDS))
    assert trainer.step()["lr"] == again.step()["lr"] == pytest.approx(RATE * LINEAR[2])
    assert torch.equal(weights(trainer), weights(again))


# ---- DDPO

DDPO = dict(
    algorithm="ddpo", eta=1.0, reward_fn="tests.helpers.toy_rewards:hidden_rating", num_epochs=3, ddpo__inner_epochs=2,
    train__learning_rate=RATE, train__lr_schedule="cosine", train__lr_warmup_steps=5,
)  # fmt: skip


def test_ddpo_counts_every_update(toy_config, monkeypatch):
    """3 epochs of 2 × 2 updates. The row has the learning rate of an epoch's last update."""
    trainer = DDPOTrainer(toy_config(**DDPO))
    expected = [trainer.weights.learning_rate_after(done) for done in range(12)]
    shares = [0, 0.2, 0.4, 0.6, 0.8, *((1 + math.cos(math.pi * n / 7)) / 2 for n in range(7))]
    assert expected == pytest.approx([RATE * share for share in shares])
    used, step = [], trainer.weights.optimizer.optimizer.step
    monkeypatch.setattr(
        trainer.weights.optimizer.optimizer, "step",
        lambda closure=None: used.append(trainer.weights.optimizer.param_groups[0]["lr"]) or step(closure),
    )  # fmt: skip
    trainer.train()
    assert used == expected
    assert rates(trainer) == expected[3::4] and [row["updates"] for row in rows(trainer, "train")] == [4, 8, 12]


@pytest.mark.parametrize("epochs", [1, 2])
def test_ddpo_resumes_in_the_middle_of_its_schedule(toy_config, epochs):
    whole = DDPOTrainer(toy_config(run_name="whole", **DDPO))
    whole.train()
    parts = DDPOTrainer(toy_config(run_name="parts", **DDPO))
    parts.run.open_folder(0)
    for _ in range(epochs):
        parts.step()
    parts.save()
    parts.run.records.close()
    again = DDPOTrainer(toy_config(run_name="parts", resume_from="latest", **DDPO))
    assert again.weights.updates == 4 * epochs
    again.train()
    assert torch.equal(weights(again), weights(whole))
    assert rates(again) == rates(whole)[epochs:]


# ---- optimizers of other packages


@pytest.mark.parametrize("optimizer", ["adamw8bit", "prodigy"])
def test_an_optimizer_of_another_package_trains_and_resumes(toy_config, monkeypatch, optimizer):
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
    eight_bit.install(monkeypatch)
    fields = {**FIELDS, "train__optimizer": optimizer, "train__learning_rate": 1.0 if optimizer == "prodigy" else RATE}
    whole = AlignPropTrainer(toy_config(run_name="whole", **fields), reward_function=redness)
    before = weights(whole)
    whole.train()
    assert not torch.equal(weights(whole), before) and weights(whole).isfinite().all()
    with pytest.raises(SystemExit):
        AlignPropTrainer(toy_config(run_name="parts", **fields), reward_function=asks_to_stop(8)).train()
    parts = AlignPropTrainer(toy_config(run_name="parts", resume_from="latest", **fields), reward_function=redness)
    assert parts.global_step == 3
    parts.train()
    assert torch.equal(weights(parts), weights(whole)) and rows(parts) == rows(whole)


@pytest.mark.parametrize(("optimizer", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_told_before_a_model_is_loaded(toy_config, monkeypatch, optimizer, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("alignprop.build.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    message = f"^train.optimizer = '{optimizer}' needs the package {package}: pip install {package}$"
    with pytest.raises(ConfigError, match=message):
        AlignPropTrainer(toy_config(train__optimizer=optimizer))
