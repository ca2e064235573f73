"""GenEval's rules on detections made by hand, on drawn pictures, and on the bundled world against its judge."""

import itertools

import pytest
import torch
from torch import nn

from alignprop.prompts import load_prompts
from rewards import build_reward, tiny_judge
from rewards.geneval import COLOURS, TEMPLATES, cut_out
from rewards.geneval_rules import Clause, kept, read_clauses, relations, shares
from rewards.segmenters import Detection
from scripts.tiny import world
from tests.helpers.detector_files import make_mask2former, make_owlvit, make_yolos
from tests.helpers.pictures import as_pil, pictures
from tests.helpers.refusals import error_of
from tests.helpers.reward_files import make_clip

pytestmark = pytest.mark.usefixtures("offline")

BOX = (0, 0, 100, 100)


def at(left, top, side=100, score=1.0):
    return Detection(score, (left, top, left + side, top + side))


# ---- places


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((40, 0, 140, 100), set()),  # beyond the margin by 40 - 0.1 · 200 = 20, of 40: exactly one half
        ((41, 0, 141, 100), {"left of"}),
        ((-41, 0, 59, 100), {"right of"}),
        ((0, 41, 100, 141), {"above"}),
        ((0, -41, 100, 59), {"below"}),
        ((100, 100, 200, 200), {"left of", "above"}),
        ((-100, 100, 0, 200), {"right of", "above"}),
        (BOX, set()),
        ((20, 20, 120, 120), set()),  # within the margin
        ((150, 100, 350, 110), {"left of"}),
    ],
)
def test_the_relations_of_two_boxes(other, expected):
    assert relations(BOX, other) == expected


def test_relations_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    corner, size = 300 * torch.rand(400, 2, generator=generator), 1 + 150 * torch.rand(400, 2, generator=generator)
    for a, b in itertools.pairwise(torch.cat([corner, corner + size], dim=1).double()):
        offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
        beyond = (offset.abs() - 0.1 * (a[2:] - a[:2] + b[2:] - b[:2])).clamp(min=0) * offset.sign()
        x, y = beyond / offset.norm()
        expected = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
        assert relations(a.tolist(), b.tolist()) == {name for name, holds in expected.items() if holds}


# ---- which detections count


def test_a_score_must_exceed_the_threshold_and_16_are_kept():
    ones = [at(i, 0, score=i / 20) for i in range(20)]
    assert [one.score for one in kept(ones, 0.3)] == [i / 20 for i in range(19, 6, -1)]  # 6 / 20 does not exceed it
    assert [one.score for one in kept(ones, 0.0)] == [i / 20 for i in range(19, 3, -1)]


def test_overlapping_objects_are_one_only_if_asked_for():
    ones = [at(0, 0, score=0.9), at(5, 0, score=0.8), at(300, 0, score=0.7), at(0, 0, score=0.6)]
    assert kept(ones, 0.3) == ones
    assert kept(ones, 0.3, max_overlap=0.5) == [ones[0], ones[2]]
    # Edges belong to a box: 10 x 10 pixels from 0 to 9, of which 9 x 10 are shared.
    pair = [at(0, 0, side=9, score=0.9), at(1, 0, side=9, score=0.8)]
    assert len(kept(pair, 0.3, 90 / 110 + 1e-9)) == 2 and len(kept(pair, 0.3, 90 / 110 - 1e-9)) == 1


# ---- the verdict


def held(row, colours=None, **found):
    """The shares for metadata, detections by class, and a colour for each of them by class."""
    include, exclude = read_clauses("a prompt", row)

    def colours_of(name, ones):
        return [dict(zip(found[name], colours[name], strict=True))[one] for one in ones]

    return shares(include, exclude, found, colours_of)


def test_enough_objects_are_right_and_more_do_no_harm():
    row = {"include": [{"class": "dog", "count": 2}]}
    two = [at(0, 0), at(200, 0)]
    assert held(row, dog=two) == held(row, dog=[*two, at(400, 0)]) == [1]
    assert held(row, dog=two[:1]) == [0.5] and held(row, dog=[]) == [0]


def test_an_excluded_number_is_too_many():
    row = {"include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}
    shown = [held(row, clock=[at(200 * i, 0) for i in range(n)]) for n in range(7)]
    assert shown == [[0, 1], [0.5, 1], [1, 1], [1, pytest.approx(2 / 3)], [1, pytest.approx(1 / 3)], [1, 0], [1, 0]]


def test_only_the_surest_objects_are_asked_for_their_colour():
    row = {"include": [{"class": "car", "count": 2, "color": "red"}]}
    cars = [at(0, 0), at(200, 0), at(400, 0)]
    assert held(row, {"car": ["red", "red", "blue"]}, car=cars) == [1]
    assert held(row, {"car": ["red", "blue", "red"]}, car=cars) == [0.75]
    assert held(row, {"car": ["red"]}, car=cars[:1]) == [0.5]


def test_a_place_is_relative_to_all_objects_of_an_earlier_clause():
    row = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}]}
    dog, cat = at(0, 0), at(300, 0)
    assert held(row, dog=[dog], cat=[cat]) == [1, 1]
    assert held(row, dog=[cat], cat=[dog]) == [1, 0.5]
    assert held(row, dog=[], cat=[cat]) == [0, 0.5] and held(row, dog=[dog], cat=[]) == [1, 0]
    row["include"][0]["count"] = 2
    assert held(row, dog=[dog, at(100, 0)], cat=[cat]) == [1, 1]
    assert held(row, dog=[dog, at(600, 0)], cat=[cat]) == [1, 0.5]


def test_every_prompt_of_the_benchmark_is_read():
    prompts = load_prompts("geneval")
    rows = [read_clauses(*row) for row in zip(prompts.prompts, prompts.metadata, strict=True)]
    assert rows[0] == ([Clause("bench", 1)], [])
    clauses = [clause for include, _ in rows for clause in include]
    assert len(clauses) == 852 and sum(clause.relation is not None for clause in clauses) == 100
    assert sum(clause.colour is not None for clause in clauses) == 294
    assert sum(len(exclude) for _, exclude in rows) == 80


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({}, "metadata 'include' is None; geneval needs a list"),
        ({"include": []}, "'include' is []"),
        ({"include": '[{"class": "dog"}]'}, "'include' is '[{"),
        ({"include": ["dog"]}, "must be an object"),
        ({"include": [{"class": "dog", "count": 1}], "exclude": 3}, "'exclude' is 3"),
        ({"include": [{"class": " ", "count": 1}]}, "'class' must be the name"),
        ({"include": [{"class": "dog"}]}, "'count' must be a whole number from 1"),
        ({"include": [{"class": "dog", "count": 0}]}, "'count' must be a whole number from 1"),
        ({"include": [{"class": "dog", "count": True}]}, "'count' must be a whole number from 1"),
        ({"include": [{"class": "dog", "count": 1, "color": "gren"}]}, "did you mean 'green'?"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "an earlier included object"),
        (
            {"include": [{"class": "dog", "count": 1}] * 2 + [{"class": "x", "count": 1, "position": ["on", 0]}]},
            "left of",
        ),
        ({"include": [{"class": "dog", "count": 1, "position": 3}]}, "an earlier included object"),
    ],
)
def test_metadata_of_another_form_are_one_line(row, part):
    message = error_of(read_clauses, "a prompt", row)
    assert message.startswith("prompt 'a prompt': metadata ") and part in message


# ---- crops and colours


def test_an_object_is_cut_out_on_grey_as_pillow_does_it():
    from PIL import Image

    (image,) = pictures(1, 30, 40)
    mask = torch.rand(30, 40, generator=torch.Generator().manual_seed(1)) > 0.5
    grey = Image.new("RGB", (40, 30), color="#999")
    box = (5.0, 3.0, 25.0, 21.0)
    expected = Image.composite(as_pil(image), grey, Image.fromarray(mask.numpy())).crop(box)
    assert as_pil(cut_out(image, Detection(1.0, box, mask))).tobytes() == expected.tobytes()
    fractions = (5.4, 2.6, 24.5, 21.5)
    assert as_pil(cut_out(image, Detection(1.0, fractions))).tobytes() == as_pil(image).crop(fractions).tobytes()
    assert cut_out(image, Detection(1.0, (40.0, 30.0, 40.0, 30.0))).shape == (3, 1, 1)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    return {"model": str(make_mask2former(folder / "model")), "clip": str(make_clip(folder / "clip", seed=1))}


def make(options, **more):
    (term,) = build_reward("geneval", {"geneval": {**options, **more}}).terms.values()
    return term


def test_a_colour_is_that_of_the_nearest_mean_of_the_three_texts(options):
    """Against transformers' own CLIP, text by text, and torchvision's crop on Pillow's pictures."""
    from transformers import CLIPModel

    reward = make(options)
    assert TEMPLATES[1].format(colour="red", name="dog") == "a photo of a red-colored dog"
    (image,) = pictures(1, 90, 120)
    ones = [Detection(1.0, (10.0 * i, 5.0 * i, 10.0 * i + 50 + 3 * i, 5.0 * i + 40)) for i in range(6)]
    model = CLIPModel.from_pretrained(options["clip"]).eval()
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    vectors = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object"]
        tokens = reward.tower.tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            output = model.text_model(**tokens).pooler_output
            vectors.append(unit(unit(model.text_projection(output)).mean(dim=0)))
    expected = []
    for one in ones:
        crop = as_pil(image).crop(one.box)
        scale = 64 / min(crop.size)
        crop = crop.resize([int(side * scale) for side in crop.size], resample=3)
        left, top = (round((side - 64) / 2) for side in crop.size)
        crop = crop.crop((left, top, left + 64, top + 64))
        pixels = torch.tensor(list(crop.tobytes())).view(64, 64, 3).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
        with torch.no_grad():
            embedding = model.visual_projection(model.vision_model(pixel_values=pixels[None]).pooler_output)[0]
        expected.append(COLOURS[int((torch.stack(vectors) @ unit(embedding)).argmax())])
    torch.testing.assert_close(reward._vectors("dog"), torch.stack(vectors), rtol=0, atol=1e-5)
    assert reward.colours_of(image, "dog", ones) == expected
    assert reward.colours_of(image, "dog", ones[2:3]) == expected[2:3]


# ---- whole pictures: shapes are found by their exact colours, and named by their size


PAINT = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
SIDES = {"square": 24, "dot": 10}


class ShapeFinder(nn.Module):
    """Finds squares of pure colour on black, each with its mask. The threshold of a call is kept."""

    def find(self, image, names, floor):
        self.floor, found = floor, {name: [] for name in names}
        for paint in PAINT.values():
            cover = (image == torch.tensor(paint).view(3, 1, 1)).all(dim=0)
            while cover.any():
                top, left = cover.nonzero()[0].tolist()
                side = int(cover[top, left:].int().cumprod(0).sum())
                mask = torch.zeros_like(cover)
                mask[top : top + side, left : left + side] = True
                cover = cover & ~mask
                name = next((name for name, length in SIDES.items() if length == side), None)
                if name in found:
                    box = (float(left), float(top), float(left + side), float(top + side))
                    found[name].append(Detection(0.95, box, mask))
        return found


class MeanColour(nn.Module):
    """In the place of a CLIP: pictures are their mean offset from grey, texts the offset of the colour they name."""

    def embed_images(self, images):
        return nn.functional.normalize(images.mean(dim=(2, 3)) - 0.6, dim=1)

    def embed_prompts(self, texts):
        paints = [next((rgb for name, rgb in PAINT.items() if f" {name}" in text), (0.6, 0.6, 0.5)) for text in texts]
        return nn.functional.normalize(torch.tensor(paints) - 0.6, dim=1)


def draw(*shapes):
    """A picture [1, 3, 96, 128] of (name, colour, left, top)."""
    image = torch.zeros(1, 3, 96, 128)
    for name, colour, left, top in shapes:
        side = SIDES[name]
        image[0, :, top : top + side, left : left + side] = torch.tensor(PAINT[colour]).view(3, 1, 1)
    return image


def wish(**clauses):
    return {"tag": "colors", "include": [{"class": "square", "count": 1, **clauses}]}


COUNTING = {
    "tag": "counting",
    "include": [{"class": "dot", "count": 2}],
    "exclude": [{"class": "dot", "count": 3}],
}
PLACE = {
    "tag": "position",
    "include": [{"class": "square", "count": 1}, {"class": "dot", "count": 1, "position": ["above", 0]}],
}
BOTH = {
    "tag": "color_attr",
    "include": [{"class": "square", "count": 1, "color": "red"}, {"class": "dot", "count": 1, "color": "blue"}],
}
A, B, C = ("dot", "red", 10, 10), ("dot", "red", 50, 10), ("dot", "blue", 90, 10)
RED, GREEN = ("square", "red", 20, 50), ("square", "green", 80, 50)


@pytest.mark.parametrize(
    ("shapes", "row", "correct", "partial"),
    [
        ([RED], wish(), 1, 1),
        ([A], wish(), 0, 0),
        ([A, B], COUNTING, 1, 1),
        ([A, B, C], COUNTING, 0, 5 / 6),
        ([A], COUNTING, 0, 3 / 4),
        ([RED], wish(color="red"), 1, 1),
        ([GREEN], wish(color="red"), 0, 1 / 2),
        ([A, RED], PLACE, 1, 1),
        ([RED, ("dot", "blue", 28, 80)], PLACE, 0, 3 / 4),
        ([A, GREEN], PLACE, 0, 3 / 4),  # more beside than above
        ([A], PLACE, 0, 1 / 4),
        ([RED, C], BOTH, 1, 1),
        ([RED, A], BOTH, 0, 3 / 4),
        ([("square", "blue", 20, 50), A], BOTH, 0, 1 / 2),
    ],
)
def test_drawn_pictures_get_their_verdict(shapes, row, correct, partial, options):
    for asked, expected in ((False, correct), (True, partial)):
        reward = make(options, partial=asked)
        reward.finder, reward.tower = ShapeFinder(), MeanColour()
        assert reward(draw(*shapes), ["a prompt"], [row]).tolist() == pytest.approx([expected])
        assert reward.finder.floor == (0.9 if row["tag"] == "counting" else 0.3)


def test_pictures_are_rounded_to_8_bits_and_judged_alone(options):
    reward = make(options)
    reward.finder, reward.tower = ShapeFinder(), MeanColour()
    images, rows = torch.cat([draw(RED), draw(GREEN), draw(A)]) + 0.001, [wish(color="red")] * 3
    assert reward(images, ["p"] * 3, rows).tolist() == [1, 0, 0]
    assert [reward(image[None], ["p"], rows[:1]).item() for image in images] == [1, 0, 0]


def test_the_networks_work_together(options):
    """Random weights find something, so a threshold between two scores decides."""
    images = pictures(2, 70, 90)
    finder = make(options).finder
    best = [max(one.score for one in finder.find(image, ["bench"], 0.0)["bench"]) for image in images]
    reward = make(options, threshold=min(1.0, sum(best) / 2))
    rows = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}]}] * 2
    assert reward(images, ["p"] * 2, rows).tolist() == [float(score > sum(best) / 2) for score in best]
    assert best[0] != best[1] and not reward.differentiable
    rows = [{"tag": "colors", "include": [{"class": "bench", "count": 1, "color": c}]} for c in COLOURS]
    reward = make(options, threshold=0.0)
    scores = [reward(images, ["p"] * 2, [row] * 2) for row in rows]
    assert torch.stack(scores).sum(dim=0).tolist() == [1, 1], "each object has one colour"
    assert [*reward.colour_vectors] == ["bench"]


@pytest.mark.parametrize("kind", ["yolos", "owlvit"])
def test_a_detector_of_boxes_does_as_well(kind, options, tmp_path):
    folder = {"yolos": make_yolos, "owlvit": make_owlvit}[kind](tmp_path / kind)
    reward = make({**options, "model": str(folder)}, threshold=0.0)
    (image,) = pictures(1, 80, 100)
    found = reward.finder.find(image, ["person", "apple"], 0.0)
    log_odds, boxes = reward.finder.detector(image[None], ["apple"])
    assert [one.score for one in found["apple"]] == log_odds[0].sigmoid().tolist()
    shares = torch.tensor([one.box for one in found["apple"]]) / torch.tensor([100.0, 80.0, 100.0, 80.0])
    torch.testing.assert_close(shares, boxes[0].clamp(0, 1))
    assert all(one.mask is None for one in found["apple"])
    row = {"tag": "colors", "include": [{"class": "apple", "count": 1}, {"class": "person", "count": 2}]}
    assert reward(image[None], ["p"], [row]).tolist() == [1]


# ---- the bundled world


class JudgedFinder(nn.Module):
    """Finds what the bundled judge sees: as many shapes as it counts, and the background as an object of its own."""

    def find(self, image, names, floor):
        judge, content, _ = tiny_judge._judged(image[None])
        count, _, shape, background = (int(content[name].argmax()) for name in tiny_judge.CONTENT)
        seen = {judge.config["shapes"][shape]: count + 1, f"{judge.config['backgrounds'][background]} background": 1}
        return {name: [at(70 * i, 0) for i in range(seen.get(name, 0))] for name in names}


def judged_colours(picture, name, detections):
    judge, content, _ = tiny_judge._judged(picture[None])
    return [judge.config["colours"][int(content["colour"].argmax())]] * len(detections)


def as_metadata(prompt, config):
    """GenEval's metadata for "two red circles on a blue background"."""
    count, colour, shape, background = tiny_judge.parse(prompt, config)
    name = config["shapes"][shape]
    figure = {"class": name, "count": count + 1, "color": config["colours"][colour]}
    ground = {"class": f"{config['backgrounds'][background]} background", "count": 1}
    return {"tag": "counting", "include": [figure, ground], "exclude": [{"class": name, "count": count + 2}]}


def test_the_verdict_is_the_judges_obedience_on_the_bundled_world(options):
    generator = torch.Generator().manual_seed(7)
    contents = world.sample_contents(120, generator, many=0.1)
    images = world.to_float(world.draw(contents, world.sample_styles(120, generator), generator))
    config = tiny_judge.load().config
    own = torch.where(contents[:, :1] == 3, torch.tensor([[2, 0, 0, 4]]), contents)  # no prompt asks for a crowd
    changed = own.clone()
    for row in range(120):  # another count, shape or background, in turn; the next of its kind
        place = (0, 2, 3)[row % 3]
        changed[row, place] = (own[row, place] + 1) % (3, 8, 3, 7)[place]
    reward = make(options)
    reward.finder, reward.colours_of = JudgedFinder(), judged_colours
    shown = []
    for wanted in (own, changed, own.roll(1, dims=0)):
        prompts = [world.caption(row) for row in wanted]
        verdicts = reward(images, prompts, [as_metadata(prompt, config) for prompt in prompts])
        assert torch.equal(verdicts, tiny_judge.obedience(images, prompts, None))
        shown.append(verdicts.mean().item())
    assert shown[0] > 0.85 and shown[1] < 0.05 and shown[2] < 0.05


# ---- options


def test_prompts_without_metadata_are_one_line(options):
    assert "prompt 'a dog': metadata 'include' is None" in error_of(make(options), pictures(1), ["a dog"])
