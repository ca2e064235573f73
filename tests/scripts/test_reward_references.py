"""Rewards against their references (see reward_references.py), and against what they were when they were right.

The packages that some references are, are installed aside, once, in the git-ignored `work/`.
"""

from functools import cache

import pytest
import torch

from rewards import build_reward
from tests.helpers.reward_cases import CASES
from tests.helpers.reward_files import make_options
from tests.helpers.reward_references import PROMPTS, as_images, compare, pictures

# Rewards without words, and those whose reference reads its own in one piece.
WITHOUT_TOKENS = ("aesthetic", "vqascore", "clip_image", "dino", "lpips")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> its case, made once."""
    return cache(lambda name: CASES[name](tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", CASES)
def test_a_reward_equals_its_reference(name, made):
    case = made(name)
    difference = compare(case)
    # The weights tell the samples apart, far above the tolerances.
    assert case.scores.std() > 3e-4 * case.scores.abs().max()
    assert difference.pixels < 1e-4
    assert difference.tokens is (None if name.startswith(WITHOUT_TOKENS) else True)
    assert difference.scores < 1e-5
    norms = case.gradient.flatten(1).norm(dim=1)
    assert norms.min() > 1e-2 * norms.max() > 0 and difference.gradient < 1e-5
    # PIL computes in integers, so a value near the middle of two levels can become the other one.
    exact = name.startswith(("hps", "dinov3", "lpips")) and name != "hpsv3"  # these do not round
    assert difference.resized < (1e-6 if exact else 5e-3) and difference.resized_scores < (5e-5 if exact else 5e-3)
    assert not any(p.requires_grad or p.grad is not None for p in case.reward.parameters())


def test_the_hpsv2_backend_is_the_package(made):
    case = made("hps")
    torch.testing.assert_close(case.answers["backend_scores"], case.scores, atol=1e-6, rtol=0)


# Scores of two pictures, which are resized, and the norm of their gradient, with the weights of `make_options`.
GOLDEN = {
    "hps": (0.01544545, -0.1295592, 0.1004474),
    "clip": (0.3492337, 0.2942793, 0.1535508),
    "pickscore": (-1.99883, -0.4765688, 21.52876),
    "imagereward": (-0.405234, -0.8977441, 0.2765652),
    "cyclereward": (-0.210189, -0.2138229, 0.03551984),
    "siglip": (0.2565219, 0.1980164, 0.1333754),
    "aesthetic": (-0.2300241, -0.2333552, 0.008465014),
    "aesthetic_v2_5": (-0.06371363, 0.1144015, 0.3022431),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_reward_is_what_it_was(name, tmp_path):
    reward = build_reward(name, {name: make_options(name, tmp_path)})
    images = torch.cat([as_images(array) for array in pictures(96, 96)[:2]]).requires_grad_()
    scores = reward(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    unit = 100 if name == "pickscore" else 1  # float32 holds a cosine to 1e-7, and this is a hundred of them
    *expected, norm = GOLDEN[name]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5 * unit)
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-5)
    assert reward.differentiable and gradient.flatten(1).norm(dim=1).min() > 0
