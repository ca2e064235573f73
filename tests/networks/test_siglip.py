"""SigLIP's files, text and preprocessing; equality with transformers is tested in test_reward_references.py."""

import json
import shutil

import pytest
import torch

from rewards import build_reward
from rewards.siglip import canonical
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import make_siglip

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two dogs on a sofa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to break."""
    return shutil.copytree(folder, tmp_path / "siglip")


def build(folder, **options):
    return build_reward("siglip", {"siglip": {"model": str(folder), **options}})


def error_of(folder) -> str:
    return refusal("siglip", model=str(folder))


def test_score_is_a_cosine_that_sees_image_and_prompt(folder, images):
    reward = build(folder)
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32 and (scores.abs() <= 1).all()
    assert (scores - reward(images.flip(0), PROMPTS)).abs().min() > 1e-3
    assert (scores - reward(images, PROMPTS[::-1])).abs().min() > 1e-3
    assert not any(p.requires_grad for p in reward.parameters())


def test_texts_are_always_padded_to_the_end(folder):
    tower = build(folder).terms["siglip"].tower
    alone, together = tower.tokenize(["a red cat"]), tower.tokenize(["a red cat", "two " * 99])
    assert alone.shape == (1, 16) and torch.equal(alone[0], together[0])
    end = 1
    assert alone[0, -1] == end and (together[1] == end).nonzero().flatten().tolist() == [15]


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [("  A  Red-Cat, 8k!! ", "a redcat 8k"), ("don't\tstop", "dont stop"), ("“Été” …", "“été” …"), ("?!", "")],
)
def test_prompts_are_cleaned_as_in_training(prompt, cleaned):
    assert canonical(prompt) == cleaned


def test_pictures_are_squashed_not_cropped(folder):
    reward = build(folder)
    wide = torch.rand(1, 3, 64, 200, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(wide, ["a cat"]).sum(), wide)
    assert (gradient.abs().amax(dim=(0, 1, 2))[[0, -1]] > 0).all()


@pytest.mark.parametrize(("resample", "mode"), [(2, "bilinear"), (3, "bicubic")])
def test_the_filter_is_the_files_own(resample, mode, tmp_path):
    preprocess = build(make_siglip(tmp_path, resample=resample)).terms["siglip"].tower.preprocess
    assert (preprocess.mode, preprocess.size) == (mode, 64)
    assert preprocess.mean.flatten().tolist() == preprocess.std.flatten().tolist() == [0.5] * 3


def test_without_a_preprocessor_file_pixels_are_from_minus_one_to_one(copy, images):
    (copy / "preprocessor_config.json").unlink()
    preprocess = build(copy).terms["siglip"].tower.preprocess
    torch.testing.assert_close(preprocess(images), 2 * images - 1)


def test_dtype_lowers_the_towers_alone(folder, images):
    reward, exact = build(folder, dtype="bfloat16"), build(folder)(images, PROMPTS)
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    assert reward(images, PROMPTS).dtype == torch.float32
    assert 0 < (reward(images, PROMPTS) - exact).abs().max() < 5e-2


# ---- SigLIP 2


def make_siglip2(folder, source):
    """As the hub's: a tokenizer.json, said to be Gemma's."""
    from transformers import Siglip2Tokenizer

    shutil.copytree(source, folder)
    (folder / "spiece.model").unlink()
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])}
    # As in the hub's files: an end token, and no first one.
    Siglip2Tokenizer(vocabulary, [], add_bos_token=False, add_eos_token=True).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GemmaTokenizer"}))
    return folder, vocabulary


def test_siglip2_reads_lower_case_and_ends(folder, tmp_path, images):
    path, vocabulary = make_siglip2(tmp_path / "siglip2", folder)
    reward = build(path)
    (tokens,) = reward.terms["siglip"].tower.tokenize(["A Cat"]).tolist()
    assert tokens == [*(vocabulary[c] for c in "a▁cat"), vocabulary["<eos>"], *[vocabulary["<pad>"]] * 10]
    (long,) = reward.terms["siglip"].tower.tokenize(["a" * 99]).tolist()
    assert long == [vocabulary["a"]] * 15 + [vocabulary["<eos>"]]
    assert reward(images, PROMPTS).isfinite().all()


def test_siglip2_for_any_shape_is_refused(copy):
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "siglip2"}
    (copy / "config.json").write_text(json.dumps(config))
    message = error_of(copy)
    assert "'siglip2'" in message and "google/siglip2-base-patch16-224" in message


# ---- what a person can get wrong


def test_missing_files_are_named(copy):
    assert "siglip.model='nobody/absent'" in error_of("nobody/absent")
    (copy / "spiece.model").unlink()
    assert "spiece.model" in error_of(copy)
    (copy / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json" in error_of(copy)


def test_a_damaged_tokenizer_is_one_line(copy):
    (copy / "spiece.model").write_bytes(b"nonsense")
    assert "no usable SigLIP tokenizer" in error_of(copy)
    (copy / "tokenizer_config.json").write_text("{")
    assert "no usable SigLIP tokenizer" in error_of(copy)


def test_a_clip_is_refused(copy):
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "clip"}
    (copy / "config.json").write_text(json.dumps(config))
    assert "is a 'clip' model; expected 'siglip'" in error_of(copy)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    small = make_siglip(tmp_path)
    from transformers import SiglipConfig, SiglipModel

    config["text_config"]["vocab_size"] = 20
    SiglipModel(SiglipConfig(**config)).save_pretrained(small)
    assert "does not fit the text tower (20)" in error_of(small)


def test_pictures_of_another_size_are_refused(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 96, "width": 96}}))
    assert "resizes to 96 pixels, but the image tower wants 64" in error_of(copy)
