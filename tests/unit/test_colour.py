"""The colour reward: its value and its gradient."""

import torch

from rewards import build_reward

GREEN = (0.1, 0.9, 0.5)


def reward_for(target):
    return build_reward("colour", {"colour": {"target": target}})


def test_each_picture_has_its_own_distance():
    images = torch.tensor([GREEN, (0.0, 0.0, 0.0), (1.0, 0.9, 0.5)])[:, :, None, None].repeat(1, 1, 4, 6)
    images[1, :, :2] = torch.tensor(GREEN)[:, None, None]
    scores = build_reward("colour")(images, ["x"] * 3)
    torch.testing.assert_close(scores, torch.tensor([0.0, -0.25, -0.3]))


def test_the_target_is_an_option():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    blue = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(
        reward_for((0, 0.25, 1.0))(images, [""] * 3), -(images - blue).abs().flatten(1).mean(dim=1)
    )


def test_the_gradient_points_at_the_target():
    images = torch.full((1, 3, 2, 2), 0.6, requires_grad=True)
    reward = reward_for([1.0, 0.5, 0.0])
    (gradient,) = torch.autograd.grad(reward(images, [""]).sum(), images)
    expected = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2) / 12
    torch.testing.assert_close(gradient, expected)


def test_it_moves_with_its_device_and_runs_without_values():
    reward = build_reward("colour", device="meta")
    assert reward(torch.empty(2, 3, 8, 8, device="meta"), ["", ""]).shape == (2,)
