"""ImageReward's checkpoint and prompts; equality with the image-reward package is in test_reward_references.py."""

from functools import partial
from unittest import mock

import pytest
import torch

from rewards import build_reward
from rewards.blip import build_blip, configs_of, split_checkpoint
from rewards.files import check_weights
from rewards.imagereward import MEAN, STD
from tests.helpers.imagereward_files import imagereward_state, make_bert_tokenizer
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import assert_gradient_is_the_central_difference, make_options

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two dogs on a sofa"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_options("imagereward", tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def reward(options):
    return build_reward("imagereward", {"imagereward": options})


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


error_of = partial(refusal, "imagereward")


def test_full_size_checkpoint_converts_strictly():
    """Every weight of the real ImageReward.pt finds its place; shapes only, nothing is allocated."""
    with mock.patch("torch.randn", lambda *shape, generator=None: torch.empty(*shape, device="meta")):
        sizes = dict(vision=1024, text=768, depths=(24, 12), mlps=(4096, 3072), positions=512)
        blip, head = split_checkpoint(imagereward_state(30524, **sizes), "it")
    vision, text = configs_of(blip, "it")
    with torch.device("meta"):
        towers = torch.nn.ModuleDict(zip(("vision_model", "text_encoder"), build_blip(vision, text), strict=True))
    check_weights(blip, towers, "it", "BLIP's")
    assert sum(p.numel() for p in towers.parameters()) == 445_278_720
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 16)
    assert (text.num_attention_heads, text.encoder_hidden_size, text.vocab_size) == (12, 1024, 30524)
    assert head["layers.0.weight"].shape == (1024, 768) and len(head) == 10


def test_score_sees_image_and_prompt(reward, images):
    scores = reward(images, PROMPTS)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    assert (scores - reward(images.flip(0), PROMPTS)).abs().min() > 1e-3
    assert (scores - reward(images, PROMPTS[::-1])).abs().min() > 1e-3
    assert not any(p.requires_grad for p in reward.parameters())
    reward.train()
    assert not any(module.training for module in reward.modules())


def test_score_is_normalised(reward, images):
    term = reward.terms["imagereward"]
    raw = term.head(term.blip(images, PROMPTS))
    torch.testing.assert_close(reward(images, PROMPTS) * 1.0333394966054072 + 0.16717362830052426, raw)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_a_prompt_scores_alone_as_among_others(reward, images):
    """Padding is masked, and the batch does not matter."""
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    tower = reward.terms["imagereward"].blip
    short = lambda prompts: tuple(t[:, :12] for t in full(prompts))  # noqa: E731
    full = tower.tokenize
    with mock.patch.object(tower, "tokenize", short):
        torch.testing.assert_close(reward(images[:1], PROMPTS[:1]), together[:1], atol=1e-5, rtol=0)


def test_tokens_are_cut_at_35_with_the_last_kept(reward):
    tokens, mask = reward.terms["imagereward"].blip.tokenize(["A", "very long " * 60])
    assert tokens.shape == mask.shape == (2, 35)
    assert mask.sum(1).tolist() == [3, 35]
    assert tokens[0, :3].tolist() == [2, 5, 3] and tokens[1, -1] == 3  # [CLS] a [SEP], lower case


def test_gradient_is_the_central_difference(reward, images):
    assert_gradient_is_the_central_difference(reward, images, PROMPTS)


def test_float32_under_autocast(reward, images):
    scores = reward(images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images, PROMPTS), scores)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_lowers_blip_alone(dtype, options, reward, images):
    half = build_reward("imagereward", {"imagereward": options | {"dtype": dtype}})
    term = half.terms["imagereward"]
    assert {p.dtype for p in term.blip.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in term.head.parameters()} == {torch.float32}
    assert 0 < (half(images, PROMPTS) - reward(images, PROMPTS)).abs().max() < 5e-2


def test_checkpoint_is_found_in_a_repository_folder(options, reward, images):
    folder = options["checkpoint"].removesuffix("/ImageReward.pt")
    found = build_reward("imagereward", {"imagereward": {"checkpoint_repo": folder, "tokenizer": options["tokenizer"]}})
    assert torch.equal(found(images, PROMPTS), reward(images, PROMPTS))


# ---- what a person can get wrong


def test_absent_files_say_what_was_tried(options, tmp_path):
    message = error_of(checkpoint_repo="nobody/absent")
    assert "imagereward.checkpoint_repo='nobody/absent'" in message and "HF_HOME" in message
    assert "does not exist" in error_of(checkpoint=str(tmp_path / "absent.pt"))
    assert "imagereward.tokenizer='nobody/absent'" in error_of(**options | {"tokenizer": "nobody/absent"})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"blip.text_encoder.encoder.layer.1.crossattention.self.key.bias": None}, "1.crossattention.self.key.bias"),
        ({"blip.visual_encoder.blocks.0.ls.gamma": torch.zeros(1)}, "visual_encoder.blocks.0.ls.gamma"),
        ({"blip.visual_encoder.norm.weight": torch.zeros(7)}, "shape [7], expected [128]"),
        ({"blip.visual_encoder.patch_embed.proj.weight": None}, "patch_embedding.weight"),
        ({"mlp.layers.4.bias": None}, "layers.4.bias"),
        ({"mlp.layers.0.weight": torch.zeros(1024, 99)}, "head wants 99 numbers, its text encoder gives 64"),
        ({"optimizer.step": torch.zeros(1)}, "unknown 'optimizer.step'"),
        ({"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(150, 96)}, "128 and 96 wide"),
    ],
)  # fmt: skip
def test_checkpoint_of_another_layout_is_one_line(change, part, options, tmp_path):
    state = torch.load(options["checkpoint"]) | change
    torch.save({name: weight for name, weight in state.items() if weight is not None}, tmp_path / "broken.pt")
    message = error_of(checkpoint=str(tmp_path / "broken.pt"), tokenizer=options["tokenizer"])
    assert str(tmp_path / "broken.pt") in message and part in message


def test_tokenizer_of_another_vocabulary_is_refused(options, tmp_path):
    make_bert_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    message = error_of(checkpoint=options["checkpoint"], tokenizer=str(tmp_path))
    assert "imagereward.tokenizer" in message and "its 8 tokens" in message
