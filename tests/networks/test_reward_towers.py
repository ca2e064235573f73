"""What every built-in reward with frozen networks keeps to, on random weights in the published formats."""

import pytest
import torch

from rewards import REWARDS, build_reward, options_name, reward_class
from tests.helpers.reward_files import make_options, save_target

pytestmark = pytest.mark.usefixtures("offline")

NAMES = [name for name in REWARDS if reward_class(name).plannable and reward_class(name).differentiable]
PROMPTS = ["a red cat", "two dogs on a sofa"]


@pytest.fixture(scope="module", params=NAMES)
def reward(request, tmp_path_factory):
    """All of them have a target, which few look at."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    built = build_reward(name, {options_name(name): make_options(name, folder)})
    metadata = [{"target": save_target(folder / "target.png")}]
    score = built.forward
    built.forward = lambda images, prompts: score(images, prompts, metadata * len(prompts))
    return built


@pytest.fixture
def images():
    """They are square, so that no row or column is cropped, and have to be resized."""
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_a_picture_scores_alone_as_in_a_batch(reward, images):
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    assert together.dtype == torch.float32 and (together[0] - together[1]).abs() > 1e-6
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_the_gradient_reaches_every_pixel_and_no_weight(reward, images):
    images.requires_grad_()
    reward(images, PROMPTS).sum().backward()
    # DINOv2's preprocessing cuts away a sixteenth on each side.
    seen = images.grad[..., 7:-7, 7:-7] if "dino" in reward.terms else images.grad
    assert images.grad.isfinite().all() and (seen != 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in reward.parameters())


def test_pictures_may_have_any_shape(reward):
    for height, width in ((64, 100), (130, 70)):
        assert reward(torch.rand(2, 3, height, width), PROMPTS).isfinite().all()


def test_scores_are_float32_under_autocast(reward, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reward(images, PROMPTS)
    assert torch.equal(under, reward(images, PROMPTS))
