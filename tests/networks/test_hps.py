"""HPSv2's checkpoint format, its prompts and its gradient; equality with the hpsv2 package is tested beside this."""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from rewards import build_reward
from rewards.files import check_weights
from rewards.hps import clean, convert_open_clip
from rewards.preprocess import PadPreprocess
from rewards.vit_h import vit_h_config
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import assert_gradient_is_the_central_difference, make_tokenizer, open_clip_state

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two dogs on a sofa"]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A checkpoint of ViT-H-14's layout with two layers of 160 and 128, and a tokenizer of CLIP's size."""
    folder = tmp_path_factory.mktemp("hps")
    torch.save({"epoch": 1, "state_dict": open_clip_state()}, folder / "HPS_v2.1_compressed.pt")
    make_tokenizer(size=49408).save_pretrained(folder / "tokenizer")
    return {"checkpoint": str(folder / "HPS_v2.1_compressed.pt"), "tokenizer": str(folder / "tokenizer")}


@pytest.fixture(scope="session")
def reward(files):
    return build_reward("hps", {"hps": files})


@pytest.fixture
def images():
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (256, 256), mode="nearest")


error_of = partial(refusal, "hps")


def test_full_size_checkpoint_converts_strictly():
    """Every weight of the real ViT-H-14 finds its place; shapes only, nothing is allocated."""
    from transformers import CLIPModel

    state = meta_state(layers=(32, 24), widths=(1280, 1024), embed_dim=1024)
    with torch.device("meta"):
        converted = convert_open_clip(state)
        config = vit_h_config(converted, "it", "its")
        model = CLIPModel(config)
    check_weights(converted, model, "it", "its")
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441  # open_clip's ViT-H-14
    vision, text = config.vision_config, config.text_config
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 14)
    assert (text.num_attention_heads, text.max_position_embeddings, text.eos_token_id) == (16, 77, 49407)
    assert vision.hidden_act == text.hidden_act == "gelu"


def meta_state(**sizes):
    """`open_clip_state` at a size that would not fit in memory."""
    with mock.patch("torch.randn", lambda *shape, generator=None: torch.empty(*shape, device="meta")):
        return open_clip_state(**sizes)


def test_converted_attention_is_torchs_own():
    """open_clip's blocks hold an nn.MultiheadAttention with query, key and value in one matrix."""
    from transformers import CLIPModel

    state = open_clip_state()
    converted = convert_open_clip(state)
    model = CLIPModel(vit_h_config(converted, "", ""))
    model.load_state_dict(converted)
    theirs = nn.MultiheadAttention(160, 2, batch_first=True)
    prefix = "visual.transformer.resblocks.1.attn."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    x = torch.randn(2, 5, 160, generator=torch.Generator().manual_seed(0))
    ours = model.vision_model.encoder.layers[1].self_attn(x)[0]
    torch.testing.assert_close(ours, theirs(x, x, x)[0], atol=1e-6, rtol=0)


def test_score_is_a_cosine_that_sees_image_and_prompt(reward, images):
    scores = reward(images, PROMPTS)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    assert (scores.abs() <= 1).all()
    swapped = reward(images.flip(0), PROMPTS)
    assert (scores - swapped).abs().min() > 1e-3
    assert (scores - reward(images, PROMPTS[::-1])).abs().min() > 1e-3


def test_gradient_is_the_central_difference(reward, images):
    assert_gradient_is_the_central_difference(reward, images, PROMPTS)


def test_float32_under_autocast(reward, images):
    images.requires_grad_()
    scores = reward(images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reward(images, PROMPTS)
    assert under.dtype == torch.float32 and torch.equal(scores, under)
    assert torch.equal(*(torch.autograd.grad(s.sum(), images)[0] for s in (scores, under)))


def test_half_precision_checkpoint_is_computed_in_float32(files, reward, images, tmp_path):
    state = {name: weight.half() for name, weight in open_clip_state().items()}
    torch.save({"state_dict": state}, tmp_path / "half.pt")
    half = build_reward("hps", {"hps": {**files, "checkpoint": str(tmp_path / "half.pt")}})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half(images, PROMPTS), reward(images, PROMPTS), atol=2e-3, rtol=0)


def test_tokens_are_padded_with_zeros_and_cut(reward):
    tokens = reward.terms["hps"].tower.tokenize(["a", "ab " * 200])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.long
    short, long = tokens
    assert short[0] == 49406 and short[2] == 49407 and (short[3:] == 0).all()
    assert long[0] == 49406 and long[-1] == 49407 and (long[1:-1] < 49406).all()
    # open_clip reads the text at the highest id, transformers at the first end token.
    assert torch.equal(tokens.argmax(dim=1), (tokens == 49407).int().argmax(dim=1))


def test_padding_does_not_reach_the_score(reward):
    tower = reward.terms["hps"].tower
    tokens = tower.tokenize(PROMPTS)
    other = torch.where(tokens == 0, 49407, tokens)  # as transformers' tokenizer pads
    assert not torch.equal(tokens, other)
    torch.testing.assert_close(tower.text_features(tokens), tower.text_features(other), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A Cat ", "a cat"),
        ("the artist’s “cat”", 'the artist\'s "cat"'),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("1 < 2 &amp;amp; 3", "1 < 2 & 3"),
        ("cafÃ©", "café"),
    ],
)
def test_prompts_are_repaired_as_open_clip_does(prompt, cleaned):
    assert clean(prompt) == cleaned


def test_picture_is_padded_not_cropped(reward):
    assert type(reward.terms["hps"].tower.preprocess) is PadPreprocess
    wide = torch.rand(1, 3, 100, 224, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(wide, ["a cat"]).sum(), wide)
    assert (gradient[..., :8].abs().amax(dim=(1, 2)) > 0).all()  # the outermost columns count


def test_checkpoint_is_found_in_a_repository_folder(files, reward, images):
    options = {"checkpoint_repo": str(Path(files["checkpoint"]).parent), "tokenizer": files["tokenizer"]}
    found = build_reward("hps", {"hps": {**options, "version": "v2.1"}})
    assert torch.equal(found(images, PROMPTS), reward(images, PROMPTS))
    assert "HPS_v2_compressed.pt" in error_of(**options, version="v2.0")


# ---------------------------------------------------------------- what a person can get wrong


def test_absent_checkpoint_says_what_was_tried(tmp_path):
    message = error_of(checkpoint_repo="nobody/absent")
    assert "hps.checkpoint_repo='nobody/absent'" in message and "HF_HOME" in message
    assert "does not exist" in error_of(checkpoint=str(tmp_path / "absent.pt"))


def broken_state(kind):
    state = open_clip_state(vocab=600)
    if kind == "missing":
        del state["visual.transformer.resblocks.1.attn.out_proj.bias"]
    elif kind == "unknown":
        state["visual.transformer.resblocks.0.ls_1.gamma"] = torch.zeros(160)
    elif kind == "shape":
        state["ln_final.weight"] = torch.zeros(100)
    elif kind == "prefixed":
        state = {f"module.{name}": weight for name, weight in state.items()}
    elif kind == "another width":
        state = open_clip_state(widths=(192, 128), vocab=600)
    return state


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("missing", "vision_model.encoder.layers.1.self_attn.out_proj.bias"),
        ("unknown", "ls_1.gamma"),
        ("shape", "[100], expected [128]"),
        ("prefixed", "patch_embedding.weight"),
        ("another width", "192"),
    ],
)
def test_checkpoint_of_another_layout_is_one_line(kind, part, files, tmp_path):
    path = tmp_path / "broken.pt"
    torch.save({"state_dict": broken_state(kind)}, path)
    message = error_of(checkpoint=str(path), tokenizer=files["tokenizer"])
    assert str(path) in message and part in message


def test_tokenizer_of_another_vocabulary_is_refused(files, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    message = error_of(checkpoint=files["checkpoint"], tokenizer=str(tmp_path))
    assert "hps.tokenizer" in message and "49408" in message


def test_absent_package_is_one_line(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    message = error_of(**files, backend="hpsv2")
    assert "hps.backend='hpsv2'" in message and "install_hps.sh" in message
