"""The learning rates against the formulas, and the making of each optimizer."""

import math
import sys

import pytest
import torch
from ml_collections import ConfigDict

from alignprop.engine.optimizers import (
    LEARNED_OPTIONS,
    OPTIMIZERS,
    PACKAGES,
    STATE_BYTES,
    check_package,
    learning_rates,
    load_optimizer,
    make_optimizer,
)
from alignprop.settings.defaults import default_config
from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS
from tests.helpers import eight_bit

RATE, UPDATES = 3e-3, 20


def options(**fields):
    train = ConfigDict({**default_config().train.to_dict(), "learning_rate": RATE})
    train.update(fields)
    return train


def share_done(done, warmup):
    return (done - warmup) / (UPDATES - warmup)


FORMULAS = {
    "constant": lambda x: 1,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "cosine_with_restarts": lambda x: (1 + math.cos(math.pi * (3 * x % 1))) / 2,
    "polynomial": lambda x: ((RATE - 1e-7) * (1 - x) ** 3 + 1e-7) / RATE,
}


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", FORMULAS)
def test_the_learning_rate_is_that_of_the_formula(schedule, warmup):
    train = options(lr_schedule=schedule, lr_warmup_steps=warmup, lr_num_cycles=3, lr_power=3.0)
    rate = learning_rates(train, UPDATES)
    rising = [RATE * done / warmup for done in range(warmup)]
    later = [RATE * FORMULAS[schedule](share_done(done, warmup)) for done in range(warmup, UPDATES)]
    assert [rate(done) for done in range(UPDATES)] == pytest.approx(rising + later, rel=1e-9)


def test_every_schedule_has_a_formula():
    assert {*FORMULAS} == {*FIELDS["train.lr_schedule"].rule.choices}


def test_a_constant_learning_rate_is_the_number_itself():
    rate = learning_rates(options(), UPDATES)
    assert all(rate(done) == RATE for done in (0, 1, UPDATES, 10 * UPDATES))


@pytest.mark.parametrize("schedule", FORMULAS)
def test_the_learning_rate_does_not_depend_on_what_was_asked_before(schedule):
    train = options(lr_schedule=schedule, lr_warmup_steps=3)
    forwards, backwards = learning_rates(train, UPDATES), learning_rates(train, UPDATES)
    found = [backwards(done) for done in reversed(range(UPDATES))]
    assert [forwards(done) for done in range(UPDATES)] == found[::-1]


@pytest.mark.parametrize("optimizer", PACKAGES)
def test_a_missing_package_is_named_with_its_command(monkeypatch, optimizer):
    monkeypatch.setitem(sys.modules, PACKAGES[optimizer], None)
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[optimizer]
    with pytest.raises(ConfigError) as caught:
        check_package(optimizer)
    assert str(caught.value) == f"train.optimizer = {optimizer!r} needs the package {package}: pip install {package}"
    for other in OPTIMIZERS.keys() - PACKAGES.keys():
        check_package(other)


def test_every_optimizer_can_be_named():
    assert OPTIMIZERS.keys() == {*FIELDS["train.optimizer"].rule.choices}


def parameters(device="cpu"):
    return [torch.nn.Parameter(torch.full((3, 4), 0.5, device=device)) for _ in range(2)]


OWN = dict(adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3, adam_weight_decay=0.25)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
def test_the_fields_of_adam_reach_the_optimizer(monkeypatch, name):
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    eight_bit.install(monkeypatch)
    (group,) = make_optimizer(parameters(), options(optimizer=name, **OWN)).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (RATE, (0.7, 0.8), 1e-3, 0.25)


@pytest.mark.parametrize("name", STATE_BYTES)
def test_without_data_the_state_has_its_size_and_needs_no_package(monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    trained = parameters("meta")
    optimizer = make_optimizer(trained, options(optimizer=name))
    for parameter in trained[:1]:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
    sizes = [sum(t.nbytes for t in state.values()) for state in optimizer.state.values() if state]
    assert sizes == [12 * {"adamw8bit": 2, "prodigy": 16}[name]]


def test_prodigy_has_the_state_that_is_counted():
    pytest.importorskip("prodigyopt")
    trained = parameters()
    optimizer = make_optimizer(trained, options(optimizer="prodigy"))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [sum(t.nbytes for t in s.values() if torch.is_tensor(t)) for s in optimizer.state.values()] == [12 * 16] * 2


def test_what_prodigy_has_learned_is_restored_and_its_options_are_those_of_now():
    pytest.importorskip("prodigyopt")

    def steps(optimizer, trained, count):
        for _ in range(count):
            for parameter in trained:
                parameter.grad = 2 * (parameter.detach() - 3)
            optimizer.step()

    whole = parameters()
    steps(make_optimizer(whole, options(optimizer="prodigy", learning_rate=1.0)), whole, 40)
    half = parameters()
    optimizer = make_optimizer(half, options(optimizer="prodigy", learning_rate=1.0))
    steps(optimizer, half, 20)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["d"] > state["param_groups"][0]["d0"]
    learned = {name: state["param_groups"][0][name] for name in LEARNED_OPTIONS}
    again = make_optimizer(half, options(optimizer="prodigy", learning_rate=1.0))
    load_optimizer(again, state, half)
    steps(again, half, 20)
    assert all(torch.equal(a, b) for a, b in zip(half, whole, strict=True))
    other = make_optimizer(half, options(optimizer="prodigy", learning_rate=0.5, **OWN))
    load_optimizer(other, state, half)
    (group,) = other.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.7, 0.8), 0.25)
    assert {name: group[name] for name in LEARNED_OPTIONS} == learned
