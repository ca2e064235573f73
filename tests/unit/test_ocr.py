"""Text in pictures: what prompts ask for, the score, and the recogniser's package, real or a stand-in."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import build_reward
from rewards.ocr import edit_distance, match, wanted_text
from rewards.pictures import to_pictures
from tests.helpers.refusals import error_of


@pytest.fixture
def package(monkeypatch):
    """Stands in for rapidocr: `package.lines` is what it reads in the next pictures, `package.seen` what it was given.

    A picture without text has None.
    """
    seen, lines, made = [], [], []

    class RapidOCR:
        def __init__(self, params):
            made.append(params)

        def __call__(self, picture):
            seen.append(picture)
            return SimpleNamespace(txts=lines.pop(0))

    module = ModuleType("rapidocr")
    module.RapidOCR = RapidOCR
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    return SimpleNamespace(seen=seen, lines=lines, made=made)


# ---- what is wanted


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ('"Hello, World!" on a wall, not "Bye"', "Hello, World!"),
        ("a shop called “Café 7”", "Café 7"),
        ('the word "it\'s" in snow', "it's"),
    ],
)
def test_the_wanted_text_is_the_first_in_double_quotes(prompt, text):
    assert wanted_text(prompt, {}) == text


def test_metadata_comes_before_the_prompt():
    assert wanted_text('a sign "OPEN"', {"text": "CLOSED"}) == "CLOSED"
    assert wanted_text("a year in lights", {"text": 1984}) == "1984"


@pytest.mark.parametrize("prompt", ["a cat", "", "a 'cat'", 'a cat with one "', 'a sign ""', 'a sign " "'])
def test_a_prompt_without_text_is_one_line(prompt):
    message = error_of(wanted_text, prompt, {})
    assert message.startswith(f"prompt {prompt!r}: the ocr reward finds no text")


@pytest.mark.parametrize("text", ["", "  ", None])
def test_metadata_without_text_are_one_line(text):
    assert "'a sign \"OPEN\"'" in error_of(wanted_text, 'a sign "OPEN"', {"text": text})


# ---- the score


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_the_edit_distance_is_that_of_levenshtein(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_the_edit_distance_is_that_of_its_recursion():
    """The definition, without the table."""

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b[1:]) + (a[0] != b[0]), slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    words = ["", "a", "ab", "ba", "abc", "bca", "aabb", "cabac"]
    assert all(edit_distance(a, b) == slow(a, b) for a in words for b in words)


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        ("OPEN", "OPEN", 1), ("open", "O P E N", 1), ("weareopentoday", "Open", 1), ("", "OPEN", 0),
        ("OPEM", "OPEN", 0.75), ("OPE", "OPEN", 0.75), ("O, PEN", "OPEN", 0.75), ("something else", "OPEN", 0),
        ("Hello World", "Hello, World!", 1 - 2 / 12),
    ],
)  # fmt: skip
def test_the_score_is_the_share_of_the_text_that_is_right(found, wanted, score):
    assert match(found, wanted) == pytest.approx(score)


def test_each_picture_is_read_for_its_own_prompt(package):
    package.lines += [("OP", "EN"), None, ("clo sed",)]
    images = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    reward = build_reward("ocr")
    scores = reward(images, ['a "Open"', 'b "Open"', "c"], [{}, {}, {"text": "closes"}])
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx([1, 0, 5 / 6])
    assert [picture.size for picture in package.seen] == [(30, 20)] * 3
    assert [p.tobytes() for p in package.seen] == [p.tobytes() for p in to_pictures(images)]
    pixels = torch.tensor(list(to_pictures(images)[0].get_flattened_data()))
    assert torch.equal(pixels, (images[0] * 255).round().clamp(0, 255).long().permute(1, 2, 0).reshape(-1, 3))


def test_it_has_no_gradient(package):
    package.lines += [("open",)]
    reward = build_reward("ocr")
    assert not reward.differentiable
    assert not reward(torch.rand(1, 3, 8, 8).requires_grad_(), ['"open"']).requires_grad


# ---- the package


@pytest.mark.parametrize("name", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_one_line(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = error_of(build_reward, "ocr")
    assert "pip install 'alignprop[judges]'" in message and name in message


def test_drawn_words_are_read():
    pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install 'alignprop[judges]'")
    words, pictures = ["OPEN", "Fresh bread", "No. 17"], []
    for word in words:
        picture = Image.new("RGB", (256, 128), (200, 220, 240))
        ImageDraw.Draw(picture).text((20, 40), word, (20, 20, 60), ImageFont.load_default(36))
        pictures.append(torch.tensor(list(picture.get_flattened_data())).view(128, 256, 3).permute(2, 0, 1) / 255)
    images = torch.stack([*pictures, torch.ones(3, 128, 256)])
    prompts = [f'a sign that says "{word}"' for word in [*words, "OPEN"]]
    assert build_reward("ocr")(images, prompts).tolist() == [1, 1, 1, 0]
