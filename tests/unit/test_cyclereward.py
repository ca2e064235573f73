"""CycleReward's checkpoint and prompts; equality with the cyclereward package is in test_reward_references.py."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rewards import build_reward
from tests.helpers.imagereward_files import imagereward_state
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import make_options

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two dogs on a sofa"]
error_of = partial(refusal, "cyclereward")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_options("cyclereward", tmp_path_factory.mktemp("cyclereward"))


@pytest.fixture(scope="module")
def reward(options):
    return build_reward("cyclereward", {"cyclereward": options})


def test_score_is_the_head_with_gelus_and_nothing_else(options, reward):
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    state, x = torch.load(options["checkpoint"]), reward.terms["cyclereward"].blip(images, PROMPTS)
    for i in (0, 2, 4, 6, 8):
        x = F.linear(F.gelu(x) if i else x, state[f"mlp.layers.{i}.weight"], state[f"mlp.layers.{i}.bias"])
    torch.testing.assert_close(reward(images, PROMPTS), x[:, 0])


def test_gradient_is_that_of_double_precision(reward):
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    term = reward.terms["cyclereward"]
    exact = images.detach().double().requires_grad_()
    mean, std = (values.double() for values in (term.blip.preprocess.mean, term.blip.preprocess.std))
    try:
        vision, text, head = (module.double() for module in (term.blip.vision_model, term.blip.text_encoder, term.head))
        tokens, mask = term.blip.tokenize(PROMPTS)
        states = text(
            input_ids=tokens, attention_mask=mask,
            encoder_hidden_states=vision(pixel_values=(exact - mean) / std).last_hidden_state,
        ).last_hidden_state  # fmt: skip
        (expected,) = torch.autograd.grad(head(states[:, 0]).sum(), exact)
    finally:
        term.float()
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_tokens_are_cut_at_128_with_the_last_kept(reward):
    tokens, mask = reward.terms["cyclereward"].blip.tokenize(["A", "very long " * 99])
    assert tokens.shape == mask.shape == (2, 128)
    assert mask.sum(1).tolist() == [3, 128] and tokens[1, -1] == 3


def test_checkpoint_is_found_in_a_folder(options, reward):
    folder, _, name = options["checkpoint"].rpartition("/")
    place = {"checkpoint_repo": folder, "checkpoint": name, "tokenizer": options["tokenizer"]}
    images = torch.rand(2, 3, 64, 64)
    found = build_reward("cyclereward", {"cyclereward": place})
    assert torch.equal(found(images, PROMPTS), reward(images, PROMPTS))


def test_wrong_files_are_one_line(options, tmp_path):
    message = error_of()
    assert "cyclereward.checkpoint='CycleReward-Combo.pth' does not exist" in message and "hjbahng" in message
    vocabulary = len(torch.load(options["checkpoint"])["blip.text_encoder.embeddings.word_embeddings.weight"])
    torch.save(imagereward_state(vocabulary), tmp_path / "ImageReward.pt")
    message = error_of(**options | {"checkpoint": str(tmp_path / "ImageReward.pt")})
    assert "no head of CycleReward's layout" in message and "layers.8.bias" in message
    assert "cyclereward.tokenizer='nobody/absent'" in error_of(**options | {"tokenizer": "nobody/absent"})
