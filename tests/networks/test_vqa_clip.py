"""VQAScore on CLIP-FlanT5 and LLaVA-1.5: pixels, options, files. Its scores are compared in test_reward_references."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from alignprop.models.formats import FORMATS
from alignprop.models.packed import pack, packable
from rewards import build_reward
from rewards.skeleton import skeleton_reward
from rewards.vqa_clip import SquarePreprocess
from tests.helpers.hpsv3_files import make_qwen_tokenizer
from tests.helpers.judge_references import TINY_CLIP, square_pixels
from tests.helpers.pictures import differing
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import make_dino
from tests.helpers.reward_references import as_images
from tests.helpers.vqa_files import make_clip_t5, make_llama_tokenizer, make_llava, make_t5_tokenizer

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two {dogs} on a sofa, and a <fox>"]

error_of_reward = partial(refusal, "vqascore")


@pytest.fixture
def images():
    return torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def facts_of(options) -> dict:
    return json.loads(Path(options["model"], "config.json").read_text())


FAMILIES = {"clip_t5": make_clip_t5, "llava": make_llava}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def options(family, tmp_path_factory):
    return FAMILIES[family](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def reward(options):
    return build_reward("vqascore", {"vqascore": options})


@pytest.fixture(scope="module")
def t5_options(tmp_path_factory):
    return make_clip_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def llava_options(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"))


def picture(*shape) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(56, 41), (33, 56), (150, 70), (20, 31)])
def test_pixels_are_padded_before_they_are_resized(shape):
    preprocess, array = SquarePreprocess(56, *TINY_CLIP), picture(*shape)
    assert differing(preprocess(as_images(array))[0], square_pixels(array), preprocess.std) <= (
        0 if max(shape) == 56 else 2e-3
    )


def test_a_picture_scores_alone_as_among_others(reward, images):
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert (together - reward(images.flip(0), PROMPTS)).abs().min() > 2e-3 * together.max()
    assert (together - reward(images, PROMPTS[::-1])).abs().min() > 2e-3 * together.max()


@pytest.mark.parametrize(("model_type", "layout"), [("t5", "bin"), ("clip_t5", "safetensors")])
def test_both_names_of_clip_t5_and_both_formats_are_read(model_type, layout, t5_options, images, tmp_path):
    reward, other = (
        build_reward("vqascore", {"vqascore": options})
        for options in (t5_options, make_clip_t5(tmp_path, model_type=model_type, layout=layout))
    )
    assert torch.equal(other(images, PROMPTS), reward(images, PROMPTS))


def test_the_logarithm_is_an_option(reward, options, images):
    logarithms = build_reward("vqascore", {"vqascore": options | {"log": True}})(images, PROMPTS)
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32 and (scores > 0).all() and (scores < 1).all()
    torch.testing.assert_close(logarithms, scores.log())


def test_bfloat16_is_the_default(options, reward, images):
    half = build_reward("vqascore", {"vqascore": {k: v for k, v in options.items() if k != "dtype"}})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images, PROMPTS), rtol=0.02, atol=0)


def test_layers_in_8_bits_score_about_the_same(options, reward, images):
    packed = build_reward("vqascore", {"vqascore": options})
    pack(packable(packed), FORMATS["int8"])
    scores = packed(images.requires_grad_(), PROMPTS)
    torch.testing.assert_close(scores, reward(images, PROMPTS), rtol=0.04, atol=0)
    assert (torch.autograd.grad(scores.sum(), images)[0] != 0).all()


def planned(options, dtype):
    """The reward on the meta device, from the files that it is loaded from."""
    facts = facts_of(options)
    parts = {(options["model"], "vlm"): facts}
    if "mm_vision_tower" in facts:
        clip = json.loads(Path(facts["mm_vision_tower"], "config.json").read_text())
        parts[facts["mm_vision_tower"], "clip"] = clip
    given = {"model": options["model"], "dtype": dtype}
    return skeleton_reward("vqascore", {"vqascore": given}, lambda name, field, kind: parts[name, kind])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_has_the_layers_that_are_loaded(dtype, options):
    real = build_reward("vqascore", {"vqascore": options | {"dtype": dtype}})
    plan = planned(options, dtype)
    shapes = [{k: (t.shape, t.dtype) for k, t in [*r.named_parameters(), *r.named_buffers()]} for r in (real, plan)]
    assert shapes[0] == shapes[1]
    assert len(packable(real)) == len(packable(plan)) > 20
    assert not any("vision_tower" in name for name in real.state_dict()), "the CLIP has one name"
    # One of CLIP's two layers is read.
    assert len(real.terms["vqascore"].tower.vision.encoder.layers) == 1
    images = torch.zeros(2, 3, 512, 384, device="meta", requires_grad=True)
    (gradient,) = torch.autograd.grad(plan(images, PROMPTS).sum(), images)
    assert gradient.shape == images.shape


# ---- what a person can get wrong


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_vision_tower": None}, "a T5 without pictures: its config.json has no mm_vision_tower"),
        ({"mm_vision_tower": "nobody/absent"}, "mm_vision_tower='nobody/absent': no such folder"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear' is not supported; allowed: 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch' is not supported; allowed: 'patch'"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer='last' is no whole number"),
        ({"mm_vision_select_layer": -4}, "mm_vision_select_layer=-4 is outside of the CLIP's 2 layers"),
        ({"mm_hidden_size": 24}, "mm_hidden_size=24, but mm_vision_tower="),
        ({"d_model": "wide"}, "its config.json is not that of a T5"),
        ({"model_type": "bert"}, "is a 'bert' model; expected one of 'qwen2_5_vl' (Qwen/"),
    ],
)  # fmt: skip
def test_a_clip_t5_configuration_that_does_not_fit_is_one_line(changes, words, t5_options, tmp_path):
    shutil.copytree(t5_options["model"], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts_of(t5_options) | changes))
    message = error_of_reward(**t5_options | {"model": str(tmp_path / "model")})
    assert "vqascore.model" in message and words in message


def test_files_that_are_damaged_or_lack_weights_are_one_line(t5_options, tmp_path):
    shutil.copytree(t5_options["model"], tmp_path / "model")
    given = t5_options | {"model": str(tmp_path / "model")}
    first = sorted((tmp_path / "model").glob("*.bin"))[0]
    weights = torch.load(first)
    lost = next(name for name in sorted(weights) if "EncDecAttention.q" in name)
    torch.save({name: weight for name, weight in weights.items() if name != lost}, first)
    assert f"lacks 1 weights of a CLIP-FlanT5 model, such as {lost}" in error_of_reward(**given)
    first.write_bytes(b"not a file of weights")
    assert "cannot be loaded as a CLIP-FlanT5 model" in error_of_reward(**given)
    (tmp_path / "model" / "config.json").write_text("{")
    assert "its config.json is damaged" in error_of_reward(**given)


def test_a_tower_that_is_no_clip_is_one_line(t5_options, tmp_path):
    shutil.copytree(t5_options["model"], tmp_path / "model")
    facts = facts_of(t5_options) | {"mm_vision_tower": str(make_dino(tmp_path / "dino"))}
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    message = error_of_reward(**t5_options | {"model": str(tmp_path / "model")})
    assert "mm_vision_tower" in message and "is a 'dinov2' model, expected 'clip'" in message


def test_another_t5_tokenizer_is_one_line(t5_options, tmp_path):
    assert "vqascore.tokenizer='google/flan-t5-xl'" in error_of_reward(**t5_options | {"tokenizer": None})
    make_qwen_tokenizer(tmp_path / "qwen")
    message = error_of_reward(**t5_options | {"tokenizer": str(tmp_path / "qwen")})
    assert "vqascore.tokenizer" in message and "T5 tokenizer" in message
    for number, changes in enumerate([{"extra": 150}, {"yes": "▁yes"}]):
        make_t5_tokenizer(tmp_path / str(number), **changes)
        message = error_of_reward(**t5_options | {"tokenizer": str(tmp_path / str(number))})
        assert "vqascore.tokenizer" in message and "does not fit the model (190 tokens" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mm_vision_tower": "x"},
            "authors' own layout; expected the layout of transformers, as llava-hf/llava-1.5-7b-hf",
        ),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type='mistral' is not supported; allowed: 'll"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "is not supported; allowed: 'clip_vision_model'"),
        ({"vision_feature_select_strategy": "full"}, "strategy='full' is not supported; allowed: 'default'"),
        ({"vision_feature_layer": -4}, "vision_feature_layer=-4 is not one of the CLIP's 2 layers"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer=[-2, -1] is not one of"),
        ({"image_token_index": "x"}, "its config.json is not that of a LLaVA"),
    ],
)
def test_a_llava_configuration_that_does_not_fit_is_one_line(changes, words, llava_options, tmp_path):
    shutil.copytree(llava_options["model"], tmp_path / "model")
    facts = facts_of(llava_options)
    for name, change in changes.items():
        facts[name] = facts[name] | change if isinstance(change, dict) else change
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    message = error_of_reward(**llava_options | {"model": str(tmp_path / "model")})
    assert "vqascore.model" in message and words in message


def test_another_llama_tokenizer_is_one_line(llava_options, tmp_path):
    make_llama_tokenizer(tmp_path / "long", extra=40)
    make_llama_tokenizer(tmp_path / "other", yes="no")
    for name in ("long", "other"):
        message = error_of_reward(**llava_options | {"tokenizer": str(tmp_path / name)})
        assert "vqascore.tokenizer" in message and "does not fit the model" in message
    message = error_of_reward(**llava_options | {"tokenizer": str(tmp_path)})
    assert "vqascore.tokenizer" in message and "the folder has no tokenizer_config.json" in message
