import torch

from alignprop.method.losses import LOSSES

REWARDS = torch.tensor([4.0, 10.0, 13.0])


def value_and_slope(name):
    rewards = REWARDS.clone().requires_grad_()
    losses = LOSSES[name](rewards, 10.0)
    return losses.tolist(), torch.autograd.grad(losses.sum(), rewards)[0].tolist()


def test_maximise():
    assert value_and_slope("maximise") == ([-4.0, -10.0, -13.0], [-1.0, -1.0, -1.0])


def test_target_turns_round_past_the_target():
    assert value_and_slope("target") == ([6.0, 0.0, 3.0], [-1.0, 0.0, 1.0])


def test_ceiling_leaves_samples_above_it_alone():
    values, slopes = value_and_slope("ceiling")
    assert values == [6.0, 0.0, 0.0]
    assert slopes[0] == -1.0 and slopes[2] == 0.0
