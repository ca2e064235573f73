"""Aesthetic predictor v2.5: its file, and its gradient in double precision."""

from functools import partial

import pytest
import torch

from rewards import build_reward
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import laion_head, make_options, v2_5_head
from tests.helpers.reward_references import through_linear_head

pytestmark = pytest.mark.usefixtures("offline")

error_of = partial(refusal, "aesthetic_v2_5")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_options("aesthetic_v2_5", tmp_path_factory.mktemp("v2_5"))


@pytest.fixture(scope="module")
def reward(options):
    return build_reward("aesthetic_v2_5", {"aesthetic_v2_5": options})


def test_score_and_gradient_are_the_packages_in_double_precision(options, reward):
    from transformers import SiglipVisionModel

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = reward(images, ["", ""])
    (gradient,) = torch.autograd.grad(scores.sum(), images)

    model, head = SiglipVisionModel.from_pretrained(options["model"]).double(), torch.load(options["head_file"])
    exact = images.detach().double().requires_grad_()
    embeddings = model(pixel_values=exact * 2 - 1).pooler_output
    expected = through_linear_head(embeddings, head, "scoring_head", (0, 2, 4, 6, 8))[:, 0]
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_the_head_is_float32_and_its_dropout_is_off(reward):
    head = reward.terms["aesthetic_v2_5"].head
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert [type(layer).__name__ for layer in head.layers] == ["Linear", "Dropout"] * 4 + ["Linear"]
    assert not any(module.training for module in reward.modules())


def test_the_image_tower_alone_is_kept(reward):
    assert not any("text" in name for name, _ in reward.named_parameters())


def test_the_head_comes_from_a_folder(options, reward, tmp_path):
    torch.save(v2_5_head(32), tmp_path / "in-repo.pth")
    place = options | {"head_repo": str(tmp_path), "head_file": "in-repo.pth"}
    images = torch.rand(1, 3, 64, 64)
    found = build_reward("aesthetic_v2_5", {"aesthetic_v2_5": place})
    assert torch.equal(found(images, [""]), reward(images, [""]))


def test_a_missing_head_says_where_it_is_from():
    message = error_of()
    assert "aesthetic_v2_5.head_file='aesthetic_predictor_v2_5.pth' does not exist" in message
    assert "github.com/discus0434" in message and "AGPL-3.0" in message


def test_another_head_is_one_line(options, tmp_path):
    torch.save(laion_head(32), tmp_path / "laion.pth")
    message = error_of(**options | {"head_file": str(tmp_path / "laion.pth")})
    assert "aesthetic-predictor-v2-5's layout" in message and "scoring_head.0.bias" in message
    torch.save(v2_5_head(48), tmp_path / "wide.pth")
    assert "of 48 numbers" in error_of(**options | {"head_file": str(tmp_path / "wide.pth")})
