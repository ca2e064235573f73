"""Rewards against their references (see reward_references.py), and against what they were when they were right.

The packages that some references are, are installed aside, once, in the git-ignored `work/`.
"""

from functools import cache

import pytest
import torch

from rewards import build_reward
from tests.helpers.reward_files import make_options
from tests.helpers.reward_references import CASES, PROMPTS, as_images, compare, pictures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> its case, made once."""
    return cache(lambda name: CASES[name](tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", CASES)
def test_a_reward_equals_its_reference(name, made):
    case = made(name)
    difference = compare(case)
    assert case.scores.std() > 1e-3  # the weights tell the samples apart, far above the tolerances
    assert difference.pixels < 1e-4
    assert difference.tokens is (None if name.startswith("aesthetic") else True)
    assert difference.scores < 1e-5
    assert case.gradient.flatten(1).norm(dim=1).min() > 1e-4 and difference.gradient < 1e-5
    # Resized by PIL, pixels are rounded to 8 bits after each of two passes: (0.7 + 0.5)/255 at most. The hpsv2
    # package resizes float tensors, as its reward does.
    exact = name == "hps"
    assert difference.resized < (1e-3 if exact else 1.2) and difference.resized_scores < (1e-5 if exact else 2e-2)


def test_the_hpsv2_backend_is_the_package(made):
    case = made("hps")
    torch.testing.assert_close(case.answers["backend_scores"], case.scores, atol=1e-6, rtol=0)


# Scores of two pictures, which are resized, and the norm of their gradient, with the weights of `make_options`.
GOLDEN = {
    "hps": (0.01544548, -0.1295593, 0.1004474),
    "clip": (0.3492863, 0.2941867, 0.153556),
    "pickscore": (-2.003661, -0.4709592, 21.54937),
    "imagereward": (-0.4052632, -0.8976876, 0.2765229),
    "cyclereward": (-0.2102134, -0.2137976, 0.03551879),
    "siglip": (0.256519, 0.1981784, 0.1334495),
    "aesthetic": (-0.2300119, -0.2333587, 0.008461547),
    "aesthetic_v2_5": (-0.06406005, 0.1142084, 0.302478),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_reward_is_what_it_was(name, tmp_path):
    reward = build_reward(name, {name: make_options(name, tmp_path)})
    images = torch.cat([as_images(array) for array in pictures(96)[:2]]).requires_grad_()
    scores = reward(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    unit = 100 if name == "pickscore" else 1  # float32 holds a cosine to 1e-7, and this is a hundred of them
    *expected, norm = GOLDEN[name]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5 * unit)
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-5)
    assert reward.differentiable and gradient.flatten(1).norm(dim=1).min() > 0
