"""VQAScore on Qwen2.5-VL: options, positions, files. Its scores are compared in test_reward_references."""

import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop.models.packed import packable
from rewards import build_reward
from rewards.skeleton import skeleton_reward
from tests.helpers.hpsv3_files import make_qwen2_5_vl, make_qwen_tokenizer
from tests.helpers.refusals import error_of, refusal
from tests.helpers.reward_files import make_clip, make_options

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two {dogs} on a sofa, café 猫"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_options("vqascore", tmp_path_factory.mktemp("vqascore"))


@pytest.fixture(scope="module")
def reward(options):
    return build_reward("vqascore", {"vqascore": options})


@pytest.fixture
def images():
    """Of 5 by 7 tokens, so that the windows of attention at the border are cut."""
    return torch.rand(2, 3, 140, 196, generator=torch.Generator().manual_seed(0))


error_of_reward = partial(refusal, "vqascore")


def test_the_logarithm_is_an_option(reward, options, images):
    logarithms = build_reward("vqascore", {"vqascore": options | {"log": True}})(images, PROMPTS)
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32 and (scores > 0).all() and (scores < 1).all()
    torch.testing.assert_close(logarithms, scores.log())


def test_a_picture_scores_alone_as_among_others(reward, images):
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)
    assert (together - reward(images.flip(0), PROMPTS)).abs().min() > 1e-3 * together.max()
    assert (together - reward(images, PROMPTS[::-1])).abs().min() > 1e-3 * together.max()


def test_bfloat16_is_the_default_and_keeps_the_angles_precise(options, reward, images):
    half = build_reward("vqascore", {"vqascore": {"model": options["model"]}})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, buffer in half.named_buffers():
        assert "inv_freq" not in name or buffer.dtype == torch.float32
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images, PROMPTS), rtol=0.1, atol=0)


def size(network):
    return sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_planned_bytes_are_those_that_are_loaded(dtype, tied, tmp_path):
    folder = make_qwen2_5_vl(tmp_path, tie_word_embeddings=tied)
    real = build_reward("vqascore", {"vqascore": {"model": str(folder), "dtype": dtype}})
    config = real.terms["vqascore"].tower.model.config.to_dict()
    planned = skeleton_reward("vqascore", {"vqascore": {"dtype": dtype}}, lambda *which: config)
    assert size(planned) == size(real)
    # 4 layers in a block of pictures and 3 in its MLP, 7 in one of text, 2 that merge, and the words.
    assert len(packable(real)) == len(packable(planned)) == 2 * 5 + 2 * 7 + 2 + 1


# ---- what a person can get wrong


def test_absent_and_foreign_models_are_one_line(options, tmp_path):
    assert "vqascore.model='nobody/absent'" in error_of_reward(model="nobody/absent")
    message = error_of_reward(model=str(make_clip(tmp_path / "clip")))
    assert "is a 'clip' model; expected one of 'qwen2_5_vl' (Qwen/Qwen2.5-VL-7B-Instruct), " in message


def test_a_file_that_lacks_weights_is_one_line(options, tmp_path):
    shutil.copytree(options["model"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    lost = sorted(name for name in weights if "mlp.up_proj" in name)[0]
    del weights[lost]
    save_file(weights, path, {"format": "pt"})
    assert "lacks 1 weights of a Qwen2.5-VL model" in error_of_reward(model=str(tmp_path / "model"))


def test_a_tokenizer_without_one_token_for_the_answer_is_refused(options, tmp_path, monkeypatch):
    monkeypatch.setattr("rewards.vqa_qwen.ANSWER", "Yes, indeed")
    message = error_of_reward(**options)
    assert "vqascore.model" in message and "1 for 'Yes, indeed'" in message


def test_a_tokenizer_of_another_vocabulary_is_refused(options, tmp_path):
    from transformers import Qwen2Tokenizer

    shutil.copytree(options["model"], tmp_path / "model")
    make_qwen_tokenizer(tmp_path / "model")
    tokenizer = Qwen2Tokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens([f"<|{i}|>" for i in range(20)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert "does not fit the model" in error_of_reward(model=str(tmp_path / "model"))
    message = error_of_reward(**options | {"tokenizer": str(tmp_path / "model")})
    assert "vqascore.tokenizer" in message and "does not fit the model" in message


def test_a_narrow_picture_is_one_line(reward):
    assert "2010x10" in error_of(reward, torch.zeros(1, 3, 10, 2010), ["a red cat"])
