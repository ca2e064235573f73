"""HPSv3's checkpoint, text and precision. Its scores are compared in test_reward_references."""

import hashlib
from functools import partial
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop.models.formats import find_format
from alignprop.models.packed import is_packed, pack, packable
from rewards import build_reward
from rewards.files import check_weights
from rewards.hpsv3 import build, config_of
from rewards.hpsv3_prompt import INSTRUCTION, REWARD_TOKEN
from rewards.skeleton import skeleton_reward
from tests.helpers.hpsv3_files import hpsv3_state, make_qwen_tokenizer
from tests.helpers.judge_references import shrink_hpsv3
from tests.helpers.refusals import error_of, refusal
from tests.helpers.reward_files import make_options

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two {dogs} on a sofa, café 猫"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_options("hpsv3", tmp_path_factory.mktemp("hpsv3"))


def small(options):
    reward = build_reward("hpsv3", {"hpsv3": options})
    shrink_hpsv3(reward)
    return reward


@pytest.fixture(scope="module")
def reward(options):
    return small(options)


@pytest.fixture(scope="module")
def tower(reward):
    return reward.terms["hpsv3"].tower


@pytest.fixture
def images():
    return torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))


error_of_reward = partial(refusal, "hpsv3")


# ---- text


def test_the_instruction_is_the_released_one():
    """Fingerprints of the package's texts, the second with what follows the reward token."""
    template = INSTRUCTION[: INSTRUCTION.index("\nPlease provide the overall ratings")]
    whole = INSTRUCTION + "\n\nEND\n"
    fingerprints = [hashlib.sha256(text.encode()).hexdigest() for text in (template, whole)]
    assert fingerprints == [
        "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a",
        "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c",
    ]
    assert INSTRUCTION.endswith(REWARD_TOKEN) and INSTRUCTION.count(REWARD_TOKEN) == 1


# ---- score and gradient


def test_score_sees_image_and_prompt(reward, images):
    scores = reward(images, PROMPTS)
    assert (scores - reward(images.flip(0), PROMPTS)).abs().min() > 1e-3
    assert (scores - reward(images, PROMPTS[::-1])).abs().min() > 1e-3


def test_a_picture_scores_alone_as_among_others(reward):
    """Pictures that are not square, and prompts of several lengths."""
    images = torch.rand(3, 3, 60, 150, generator=torch.Generator().manual_seed(1))
    prompts = [*PROMPTS, "very long " * 30]
    together = reward(images, prompts)
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 1e-3


def test_gradient_reaches_all_pixels_of_a_picture_that_is_resized(reward):
    images = torch.rand(1, 3, 130, 90, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(images, ["a red cat"]).sum(), images)
    assert (gradient != 0).all()


def test_blocks_recompute_their_activations(reward, tower, images):
    calls = {"visual": 0, "text": 0}

    def count(name):
        calls[name] += 1

    parts = {"visual": tower.model.visual.blocks[0].mlp, "text": tower.model.language_model.layers[0].mlp}
    handles = [part.register_forward_pre_hook(lambda *_, name=name: count(name)) for name, part in parts.items()]
    reward(images.requires_grad_(), PROMPTS).sum().backward()
    assert calls == {"visual": 2, "text": 2}
    with torch.no_grad():
        reward(images, PROMPTS)
    assert calls == {"visual": 3, "text": 3}
    for handle in handles:
        handle.remove()


# ---- precision and memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_lowers_the_tower_alone(dtype, options, reward, images):
    half = small(options | {"dtype": dtype})
    term = half.terms["hpsv3"]
    assert {p.dtype for p in term.tower.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in term.head.parameters()} == {torch.float32}
    assert 0 < (half(images, PROMPTS) - reward(images, PROMPTS)).abs().max() < 2e-2


def test_bfloat16_is_the_default_and_keeps_the_frequencies_of_float32(options, tower):
    default = build_reward("hpsv3", {"hpsv3": {k: v for k, v in options.items() if k != "dtype"}})
    other = default.terms["hpsv3"].tower
    assert other.dtype == torch.bfloat16
    for half, whole in zip(other.buffers(), tower.buffers(), strict=True):
        assert torch.equal(half.float(), whole)


def size(network):
    return sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_those_that_are_loaded_also_in_8_bits(dtype, options, images):
    real = small(options | {"dtype": dtype})
    config = real.terms["hpsv3"].tower.model.config.to_dict()
    planned = skeleton_reward("hpsv3", {"hpsv3": {"dtype": dtype}}, lambda *which: config)
    assert size(planned) == size(real)
    for network in (real, planned):
        layers = packable(network)
        assert len(layers) == 2 * 4 + 2 + 2 * 7 + 1  # all of the tower, and the head's only wide one
        pack(layers, find_format("int8", "quantize_rewards"))
    assert size(planned) == size(real) and is_packed(real)
    (gradient,) = torch.autograd.grad(real(images.requires_grad_(), PROMPTS).sum(), images)
    assert (gradient.abs().sum(dim=1) != 0).all()


# ---- files


def test_full_size_checkpoint_converts_strictly():
    """Every weight of the real HPSv3.safetensors finds its place; shapes only, nothing is allocated."""
    sizes = dict(vision=1280, text=3584, depths=(32, 28), mlps=(5120, 18944), pairs=512)
    with mock.patch("torch.randn", lambda *shape, generator=None: torch.empty(*shape, device="meta")):
        state = hpsv3_state(151658, **sizes)
    assert len(state) == 736
    del state["lm_head.weight"]
    config = config_of(state, "it")
    model, head = build(config)
    parts = torch.nn.ModuleDict({"visual": model.visual, "model": model.language_model, "rm_head": head})
    check_weights(state, parts, "it", "HPSv3's")
    text = config.text_config
    assert (text.num_attention_heads, text.num_key_value_heads, config.vision_config.num_heads) == (28, 4, 16)
    assert (text.rms_norm_eps, text.hidden_act, config.vision_config.hidden_act) == (1e-6, "silu", "quick_gelu")


def test_checkpoint_is_found_in_a_repository_folder_and_may_be_wrapped(options, reward, images, tmp_path):
    folder = options["checkpoint"].removesuffix("/HPSv3.safetensors")
    found = small({k: v for k, v in options.items() if k != "checkpoint"} | {"checkpoint_repo": folder})
    torch.save({"model": load_file(options["checkpoint"])}, tmp_path / "wrapped.pth")
    wrapped = small(options | {"checkpoint": str(tmp_path / "wrapped.pth")})
    for other in (found, wrapped):
        assert torch.equal(other(images, PROMPTS), reward(images, PROMPTS))


def test_absent_files_say_what_was_tried(options, tmp_path):
    message = error_of_reward(checkpoint_repo="nobody/absent")
    assert "hpsv3.checkpoint_repo='nobody/absent'" in message and "HF_HOME" in message
    assert "does not exist" in error_of_reward(checkpoint=str(tmp_path / "absent.safetensors"))
    assert "hpsv3.tokenizer='nobody/absent'" in error_of_reward(**options | {"tokenizer": "nobody/absent"})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "1.mlp.up_proj.weight"),
        ({"visual.blocks.0.ls.gamma": torch.zeros(1)}, "visual.blocks.0.ls.gamma"),
        ({"rm_head.3.weight": torch.zeros(7, 1024)}, "rm_head.3.weight has shape [7, 1024], expected [16, 1024]"),
        ({"visual.patch_embed.proj.weight": None}, "patch_embed.proj.weight"),
        ({"optimizer.step": torch.zeros(1)}, "unknown ['optimizer.step']"),
        ({"model.embed_tokens.weight": torch.zeros(708, 96)}, "widths of 160, 96 and 128"),
    ],
)  # fmt: skip
def test_checkpoint_of_another_layout_is_one_line(change, part, options, tmp_path):
    state = load_file(options["checkpoint"]) | change
    path = str(tmp_path / "broken.safetensors")
    save_file({name: weight for name, weight in state.items() if weight is not None}, path)
    message = error_of_reward(checkpoint=path, tokenizer=options["tokenizer"])
    assert path in message and part in message


def test_tokenizer_of_another_vocabulary_is_refused(options, tmp_path):
    from transformers import Qwen2Tokenizer

    make_qwen_tokenizer(tmp_path)
    tokenizer = Qwen2Tokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<|another|>"])
    tokenizer.save_pretrained(tmp_path)
    message = error_of_reward(checkpoint=options["checkpoint"], tokenizer=str(tmp_path))
    assert "hpsv3.tokenizer" in message and "its 709 tokens" in message and "708" in message


def test_a_narrow_picture_is_one_line(reward):
    assert "2010x10" in error_of(reward, torch.zeros(1, 3, 10, 2010), ["a red cat"])
