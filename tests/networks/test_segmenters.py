"""Finding objects: a random Mask2Former against a restatement of mmdet's arithmetic, and detectors of boxes."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rewards.detectors import DetectorPreprocess
from rewards.segmenters import BoxFinder, detections, full_size, instances, load_finder
from tests.helpers.detector_files import COCO, make_mask2former
from tests.helpers.pictures import as_pil, differing, pictures
from tests.helpers.refusals import error_of

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_mask2former(tmp_path_factory.mktemp("mask2former")))


@pytest.fixture(scope="module")
def finder(folder):
    return load_finder(folder, None, "geneval.model")


def restated(folder, image, label):
    """(score, box, mask) of every query for one class, one after the other, by transformers' processor and model."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    pixels = processor(images=[as_pil(image)], return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(pixel_values=pixels)
    found = []
    for classes, mask_logits in zip(output.class_queries_logits[0], output.masks_queries_logits[0], strict=True):
        odds = classes.double().exp()
        large = F.interpolate(mask_logits[None, None], pixels.shape[-2:], mode="bilinear")
        logits = F.interpolate(large, image.shape[-2:], mode="bilinear")[0, 0].double()
        ys, xs = (logits > 0).nonzero(as_tuple=True)
        inside = [1 / (1 + math.exp(-logits[y, x])) for y, x in zip(ys.tolist(), xs.tolist(), strict=True)]
        if inside:
            score = float(odds[label] / odds.sum()) * sum(inside) / len(inside)
            box = (xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1)
            found.append((score, box, logits > 0))
    return sorted(found, key=lambda one: -one[0])


@pytest.mark.parametrize("name", ["bench", "red teddy bear", "computer mouse", "tv remote", "computer keyboard"])
def test_scores_boxes_and_masks_are_those_of_the_formula(name, folder, finder):
    label = COCO.index(name if name in COCO else name.partition(" ")[2])
    (image,) = pictures(1, 64, 96)
    found = sorted(finder.find(image, ["hot dog", name], 0.0)[name], key=lambda one: -one.score)
    expected = restated(folder, image, label)
    assert len(found) == len(expected) > 8 and found[0].score > 0.1
    for ours, (score, box, mask) in zip(found, expected, strict=True):
        assert ours.score == pytest.approx(score, rel=1e-4, abs=1e-9)
        # Where a logit is 0 but for rounding, the two may differ.
        assert (ours.mask != mask).sum() <= 1 and ours.box == pytest.approx(box, abs=1)


def test_only_scores_above_the_floor_are_returned(finder):
    (image,) = pictures(1, 64, 96)
    whole = finder.find(image, COCO, 0.0)
    found = finder.find(image, COCO, 0.2)
    expected = {name: [one.score for one in ones if one.score > 0.2] for name, ones in whole.items()}
    assert {name: [one.score for one in ones] for name, ones in found.items()} == expected
    assert 0 < sum(map(len, found.values())) < sum(map(len, whole.values()))


def test_pixels_are_those_of_the_processor_in_any_size(folder, finder):
    from transformers import Mask2FormerImageProcessorPil

    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    for shape in ((64, 96), (70, 200), (90, 70), (50, 300)):
        pixels = processor(images=[as_pil(pictures(1, *shape)[0])], return_tensors="pt").pixel_values
        ours = finder.preprocess(pictures(1, *shape))
        assert not any(side % 32 for side in pixels.shape[-2:])
        assert differing(ours, pixels, 0.2) < 2e-2
        for ones in finder.find(pictures(1, *shape)[0], COCO, 0.0).values():
            assert all(one.mask.shape == shape for one in ones)


def test_a_square_size_of_the_file_is_stretched_to_the_divisor():
    text = json.dumps({"size": {"height": 40, "width": 70}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert DetectorPreprocess.from_json(text, "mask2former", "").fitted(60, 100) == (64, 96)


def test_the_100_most_probable_pairs_are_taken_over_all_classes():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    probabilities, queries, classes = instances(logits)
    pairs = sorted(((p, q, c) for q, row in enumerate(logits.softmax(1)[:, :5].tolist()) for c, p in enumerate(row)))
    expected = pairs[-100:][::-1]
    assert [(q, c) for _, q, c in expected] == list(zip(queries.tolist(), classes.tolist(), strict=True))
    assert probabilities.tolist() == [p for p, *_ in expected]
    assert len({q for _, q, _ in expected}) < 100, "some queries have several classes"


def test_a_mask_has_its_tight_box_and_mean_probability():
    logits = torch.full((2, 6, 8), -1.0)
    logits[0, 2:4, 3:7] = math.log(3)  # 0.75
    logits[0, 2, 3] = math.log(9)  # 0.9
    (one,) = detections(torch.tensor([0.5, 0.9]), logits)  # the second mask is empty
    assert one.box == (3, 2, 7, 4) and one.mask.sum() == 8
    assert one.score == pytest.approx(0.5 * (7 * 0.75 + 0.9) / 8)
    assert full_size(logits[:0], (64, 64), (5, 6)).shape == (0, 5, 6)


def test_masks_are_resized_by_way_of_the_models_own_pixels(finder, monkeypatch):
    logits = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    steps = F.interpolate(F.interpolate(logits[None], (64, 96), mode="bilinear"), (50, 70), mode="bilinear")[0]
    assert torch.equal(full_size(logits, (64, 96), (50, 70)), steps)
    assert not torch.allclose(steps, F.interpolate(logits[None], (50, 70), mode="bilinear")[0], atol=0.1)
    asked = []
    monkeypatch.setattr("rewards.segmenters.full_size", lambda *args: asked.append(args[1:]) or full_size(*args))
    finder.find(pictures(1, 50, 70)[0], ["bench"], 0.0)
    assert asked == [((64, 96), (50, 70))]


def test_each_picture_is_found_alone_and_weights_are_frozen(finder):
    assert not any(weight.requires_grad for weight in finder.parameters()) and not finder.model.training
    (image,) = pictures(1, 64, 96)
    first, again = (finder.find(image.requires_grad_(), ["bench"], 0.0)["bench"] for _ in range(2))
    assert [one.score for one in first] == [one.score for one in again]


@pytest.mark.parametrize(("square", "expected"), [(False, (30, 10, 60, 40)), (True, (30, 15, 60, 40))])
def test_boxes_are_in_pixels_of_the_picture_without_its_padding(square, expected):
    """Shares of a picture of 40 x 60 pixels, or of the square that it is padded to; what lies outside is cut off."""
    detector = torch.nn.Module()
    detector.preprocess = SimpleNamespace(square=square)
    boxes = torch.tensor([[[0.5, 0.25, 1.1, 1.2]] * 2])
    detector.forward = lambda images, names: (torch.tensor([[0.0, -9.0]]), boxes)
    (one,) = BoxFinder(detector).find(torch.zeros(3, 40, 60), ["dog"], 0.3)["dog"]
    assert one.score == 0.5 and one.box == pytest.approx(expected)


# ---- what a person can get wrong


def load(folder):
    return load_finder(str(folder), None, "geneval.model")


def test_a_model_of_another_kind_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "maskformer"}))
    message = error_of(load, tmp_path / "copy")
    assert "'maskformer' model" in message and "mask2former, owlvit, owlv2, yolos, detr" in message


def test_missing_weights_and_files_are_one_line(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    weights = load_file(path)
    del weights["class_predictor.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "lacks 1 weights of a mask2former model, such as class_predictor.bias" in error_of(load, tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    assert "processor_config.json" in error_of(load, tmp_path / "copy")
    assert "no such folder here" in error_of(load, tmp_path / "absent")


def test_without_scipy_it_is_one_line(folder, monkeypatch):
    monkeypatch.setattr("rewards.segmenters.importlib.util.find_spec", lambda name: None)
    assert "needs the package scipy: pip install scipy" in error_of(load, folder)


def test_an_unknown_class_is_one_line(finder):
    message = error_of(finder.find, pictures(1)[0], ["bnch"], 0.0)
    assert "has no class 'bnch'" in message and "did you mean 'bench'" in message
