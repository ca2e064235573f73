"""PickScore's own files and scale; equality with transformers is tested in test_reward_references.py."""

import math
from functools import partial

import pytest
import torch

from rewards import build_reward
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import make_options, make_tokenizer

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two dogs"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_options("pickscore", tmp_path_factory.mktemp("pickscore"))


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


error_of = partial(refusal, "pickscore")


def test_score_is_the_files_own_scale_times_the_cosine(options, images, tmp_path):
    from transformers import CLIPModel

    reward = build_reward("pickscore", {"pickscore": options})
    cosines = reward.terms["pickscore"].tower.similarity(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), 100 * cosines)
    model = CLIPModel.from_pretrained(options["model"])
    model.logit_scale.data.fill_(math.log(50))
    model.save_pretrained(tmp_path)
    half = build_reward("pickscore", {"pickscore": options | {"model": str(tmp_path)}})
    torch.testing.assert_close(half(images, PROMPTS), 50 * cosines)


def test_the_scale_is_float32_in_any_precision(options, images):
    exact = build_reward("pickscore", {"pickscore": options})(images, PROMPTS)
    reward = build_reward("pickscore", {"pickscore": options | {"dtype": "bfloat16"}})
    assert reward.terms["pickscore"].tower.scale == pytest.approx(100)  # log(100) in bfloat16 is that of 98.9
    assert 0 < (reward(images, PROMPTS) - exact).abs().max() < 3
    assert reward(images, PROMPTS).dtype == torch.float32


def test_tokenizer_and_preprocessing_are_the_processors(options):
    tower = build_reward("pickscore", {"pickscore": options}).terms["pickscore"].tower
    torch.testing.assert_close(tower.preprocess.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    own = build_reward("clip", {"clip": {"model": options["model"]}}).terms["clip"].tower
    assert not torch.equal(tower.preprocess.mean, own.preprocess.mean)


def test_what_is_wrong_with_the_processor_names_it(options, tmp_path):
    message = error_of(model=options["model"], processor="nobody/absent")
    assert "pickscore.processor='nobody/absent'" in message and "HF_HOME" in message
    make_tokenizer(size=700).save_pretrained(tmp_path)
    message = error_of(model=options["model"], processor=str(tmp_path))
    assert "pickscore.processor" in message and "does not fit the text tower" in message


def test_what_is_wrong_with_the_model_names_it(options):
    assert "pickscore.model='nobody/absent'" in error_of(model="nobody/absent", processor=options["processor"])
