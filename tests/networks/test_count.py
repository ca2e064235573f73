"""Counting: what prompts ask for, the judge's count, and detectors against transformers on random weights."""

import json
import shutil

import pytest
import torch

from rewards import RewardError, build_reward
from rewards.count import parse_count, survivors, wanted_count
from rewards.detectors import DetectorPreprocess
from scripts.tiny import world
from tests.helpers.detector_files import make_detr, make_owlvit, make_yolos
from tests.helpers.pictures import as_pil, differing, pictures
from tests.helpers.refusals import error_of
from tests.helpers.reward_files import laion_head, make_clip

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def owlvit(tmp_path_factory):
    return str(make_owlvit(tmp_path_factory.mktemp("owlvit")))


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    return str(make_yolos(tmp_path_factory.mktemp("yolos")))


@pytest.fixture(scope="module")
def detr(tmp_path_factory):
    return str(make_detr(tmp_path_factory.mktemp("detr")))


def detector_of(model):
    return build_reward("count", {"count": {"model": model}}).terms["count"].detector


# ---- what to count


@pytest.mark.parametrize(
    ("prompt", "name", "count"),
    [
        ("two dogs", "dog", 2),
        ("3 cats", "cat", 3),
        ("a red circle", "red circle", 1),
        ("two red circles on a blue background", "red circle", 2),
        ("A photo of four teddy bears sitting on a bench", "teddy bear", 4),
        ("an old oil painting of three wolves, moonlight", "wolf", 3),
        ("no glasses", "glass", 0),
        ("12 benches in a park", "bench", 12),
        ("two wedding rings", "wedding ring", 2),
        ("a king", "king", 1),
        ("five people and a dog", "person", 5),
        ("seven strawberries", "strawberry", 7),
        ("on the table there are two boxes", "box", 2),
        ("one bus", "bus", 1),
    ],
)
def test_number_and_object_are_read_from_a_prompt(prompt, name, count):
    assert parse_count(prompt) == (name, count)
    assert wanted_count(prompt, {}) == (name, count)


@pytest.mark.parametrize("prompt", ["dog", "", "two", "a photo of the sea", "two of them", "a group of children"])
def test_a_prompt_without_a_count_is_one_line(prompt):
    assert repr(prompt) in error_of(parse_count, prompt)


def test_metadata_comes_before_the_prompt():
    assert wanted_count("the sea", {"object": "red boat", "count": 3}) == ("red boat", 3)
    assert wanted_count("two dogs", {"count": 5}) == ("dog", 5)
    assert wanted_count("two dogs", {"object": "cat"}) == ("cat", 2)


@pytest.mark.parametrize("row", [{"count": -1}, {"count": "2"}, {"count": 1.5}, {"count": True}, {"object": " "}])
def test_wrong_metadata_is_one_line(row):
    assert f"metadata '{next(iter(row))}'" in error_of(wanted_count, "two dogs", row)


# ---- in the tiny world


@pytest.fixture(scope="module")
def scenes():
    generator = torch.Generator().manual_seed(4)
    contents = world.sample_contents(60, generator, many=0)
    images = world.to_float(world.draw(contents, world.sample_styles(60, generator), generator))
    return images, [world.caption(row) for row in contents], contents[:, 0]


def recount(prompt):
    """The prompt with another number of the same shape."""
    head, colour, shape, *rest = prompt.split()
    return " ".join(["three" if head != "three" else "two", colour, shape.rstrip("s") + "s", *rest])


def test_the_right_number_scores_high_and_another_low(scenes):
    images, prompts, _ = scenes
    reward = build_reward("tiny_count")
    right, wrong = reward(images, prompts), reward(images, [recount(prompt) for prompt in prompts])
    assert (right <= 0).all() and right.mean() > -0.05
    assert (right > -0.7).float().mean() >= 0.98 and (wrong < -0.7).float().mean() >= 0.98


def test_the_probabilities_of_all_counts_add_up_to_one(scenes):
    images, prompts, counts = scenes
    reward = build_reward("tiny_count")
    scores = torch.stack([reward(images, prompts, [{"count": n}] * len(images)) for n in (1, 2, 3, 9)])
    torch.testing.assert_close(scores.exp().sum(dim=0), torch.ones(len(images)))
    assert torch.equal(scores.gather(0, counts[None])[0], reward(images, prompts))


def test_ascent_on_the_tiny_count_changes_the_count():
    generator = torch.Generator().manual_seed(9)
    contents = torch.tensor([[1, 0, 0, 4]] * 4)
    images = world.to_float(world.draw(contents, torch.zeros(4, 4), generator))
    reward, prompts = build_reward("tiny_count"), ["three red circles on a blue background"] * 4
    before = reward(images, prompts)
    for _ in range(20):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
        images = (images + 0.01 * gradient.sign()).clamp(0, 1).detach()
    assert (before < -3).all() and (reward(images, prompts) > -0.7).all()


def test_the_tiny_count_refuses_other_prompts(scenes):
    reward = build_reward("tiny_count")
    assert "'a dog'" in error_of(reward, scenes[0][:1], ["a dog"])
    assert "metadata 'count' is 0" in error_of(reward, scenes[0][:1], ["a dog"], [{"count": 0}])


def test_the_tiny_count_runs_without_values():
    reward = build_reward("tiny_count", device="meta")
    prompts = ["a red circle on a blue background"] * 2
    assert reward(torch.empty(2, 3, 64, 64, device="meta"), prompts).shape == (2,)


def test_it_adds_up_with_the_aesthetic_reward(scenes, tmp_path):
    make_clip(tmp_path / "clip", projection_dim=768)
    torch.save(laion_head(), tmp_path / "head.pth")
    options = {"aesthetic": {"clip": str(tmp_path / "clip"), "head_file": str(tmp_path / "head.pth")}}
    reward = build_reward("aesthetic:1,tiny_count:2", options)
    images = scenes[0][:3].clone().requires_grad_()
    terms = reward.score_terms(images, scenes[1][:3])
    total = reward(images, scenes[1][:3])
    torch.testing.assert_close(total, terms["aesthetic"] + 2 * terms["tiny_count"])
    expected = [torch.autograd.grad(terms[name].sum(), images)[0] for name in ("aesthetic", "tiny_count")]
    torch.testing.assert_close(torch.autograd.grad(total.sum(), images)[0], expected[0] + 2 * expected[1])
    assert all(gradient.abs().sum() > 0 for gradient in expected)


# ---- overlapping boxes


def test_suppression_is_greedy():
    """A chain: the first takes the second out, which therefore cannot take out the third."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10], [40, 40, 50, 50], [41, 40, 51, 50]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2])
    assert survivors(boxes, scores).tolist() == [True, False, True, False, True]
    assert survivors(boxes.flip(0), scores.flip(0)).tolist() == [True, False, True, False, True]


def test_suppression_equals_one_box_after_another():
    generator = torch.Generator().manual_seed(3)
    corner, size = torch.rand(200, 2, generator=generator), 0.1 + 0.3 * torch.rand(200, 2, generator=generator)
    boxes, scores = torch.cat([corner, corner + size], dim=1), torch.rand(200, generator=generator)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        low, high = torch.maximum(boxes[i, :2], boxes[kept, :2]), torch.minimum(boxes[i, 2:], boxes[kept, 2:])
        shared = (high - low).clamp(0).prod(dim=1)
        union = size[i].prod() + size[kept].prod(dim=1) - shared
        if not (shared / union > 0.5).any():
            kept.append(i)
    assert 10 < len(kept) < 190
    assert survivors(boxes, scores).nonzero().flatten().tolist() == sorted(kept)


# ---- detectors against transformers


def test_owlvit_scores_are_those_of_transformers(owlvit):
    from transformers import CLIPTokenizer, OwlViTForObjectDetection, OwlViTImageProcessorPil, OwlViTProcessor

    images, names = pictures(3), ["dog", "apple", "red circle"]
    texts = ["a photo of a dog", "a photo of an apple", "a photo of a red circle"]
    processor = OwlViTProcessor(OwlViTImageProcessorPil.from_pretrained(owlvit), CLIPTokenizer.from_pretrained(owlvit))
    text = processor(text=[[t] for t in texts], padding="max_length", max_length=24, truncation=True)
    pixels = processor(images=[as_pil(image) for image in images]).pixel_values
    detector = detector_of(owlvit)
    torch.testing.assert_close(detector.preprocess(images), pixels, atol=1e-5, rtol=0)
    with torch.no_grad():
        output = OwlViTForObjectDetection.from_pretrained(owlvit).eval()(**text, pixel_values=pixels)
        scores = detector.detect(pixels, names)[0].sigmoid()
        expected = processor.image_processor.post_process_object_detection(output, threshold=-1)
        _, corners = detector(images, names)
    assert torch.equal(scores, torch.stack([row["scores"] for row in expected]))
    torch.testing.assert_close(corners, torch.stack([row["boxes"] for row in expected]), atol=1e-5, rtol=0)
    assert scores.std() > 1e-3
    assert not torch.allclose(detector.detect(pixels[:1], ["dog"])[0], detector.detect(pixels[:1], ["cat"])[0])


@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_class_scores_are_those_of_transformers(kind, request):
    from transformers import AutoModelForObjectDetection, DetrImageProcessorPil, YolosImageProcessorPil

    folder = request.getfixturevalue(kind)
    processor = {"yolos": YolosImageProcessorPil, "detr": DetrImageProcessorPil}[kind].from_pretrained(folder)
    images, names = pictures(3, 64, 96), ["person", "red apple", "teddy bear"]
    pixels = processor([as_pil(image) for image in images], return_tensors="pt").pixel_values
    detector = detector_of(folder)
    torch.testing.assert_close(detector.preprocess(images), pixels, atol=1e-5, rtol=0)
    with torch.no_grad():
        output = AutoModelForObjectDetection.from_pretrained(folder).eval()(pixel_values=pixels)
        scores = detector.detect(pixels, names)[0].sigmoid()
        expected = processor.post_process_object_detection(output, threshold=-1)
        _, corners = detector(images, names)
    torch.testing.assert_close(corners, torch.stack([row["boxes"] for row in expected]), atol=1e-5, rtol=0)
    for i, label in enumerate((1, 2, 4)):
        is_best = expected[i]["labels"] == label
        torch.testing.assert_close(scores[i][is_best], expected[i]["scores"][is_best])
        torch.testing.assert_close(scores[i], output.logits.softmax(-1)[i, :, label])
    assert scores.std() > 1e-3


@pytest.mark.parametrize("kind", ["owlvit", "yolos", "detr"])
def test_the_hard_count_is_that_of_the_boxes_above_the_threshold(kind, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    images, prompts, wanted = (
        pictures(3, 80, 100),
        ["two people", "an apple", "three teddy bears"],
        torch.tensor([2, 1, 3]),
    )
    with torch.no_grad():
        log_odds, boxes = detector_of(folder)(images, ["person", "apple", "teddy bear"])
    scores = log_odds.sigmoid()
    options = {"count": {"model": folder, "threshold": scores.quantile(0.6).item() * 1.001}}
    stays = torch.stack([survivors(*row) for row in zip(boxes, scores, strict=True)])
    found = (stays & (scores > options["count"]["threshold"])).sum(dim=1)
    soft, hard = build_reward("count", options), build_reward("count_hard", options)
    assert soft.differentiable and not hard.differentiable
    assert found.sum() > 0 and torch.equal(hard(images, prompts), -(found - wanted).abs().float())
    assert not torch.allclose(soft(images, prompts), hard(images, prompts), atol=1e-3)
    monkeypatch.setattr("rewards.count.TEMPERATURE", 1e-7)
    torch.testing.assert_close(soft(images, prompts), hard(images, prompts))


@pytest.mark.usefixtures("without_rounding")
@pytest.mark.parametrize("kind", ["owlvit", "yolos", "detr"])
def test_the_count_has_the_gradient_of_every_picture(kind, request):
    reward = build_reward("count", {"count": {"model": request.getfixturevalue(kind), "threshold": 0.3}})
    images, prompts = pictures(3, 80, 100).requires_grad_(), ["12 people", "9 apples", "15 teddy bears"]
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    direction, step = gradient / gradient.abs().max(), 2e-3
    with torch.no_grad():
        up, down = (reward(images + h * direction, prompts).sum() for h in (step, -step))
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), rtol=3e-2, atol=0)


def test_the_soft_count_is_the_sum_of_sigmoids_of_what_stays(yolos):
    images = pictures(2)
    reward = build_reward("count", {"count": {"model": yolos}})
    with torch.no_grad():
        log_odds, boxes = detector_of(yolos)(images, ["apple", "bear"])
        soft = torch.sigmoid(log_odds / 0.5)  # the usual threshold of such models, 0.5, has even odds
        counts = torch.stack([s[survivors(b, p)].sum() for s, b, p in zip(soft, boxes, log_odds, strict=True)])
        metadata = [{"object": "apple", "count": 7}, {"object": "bear", "count": 0}]
        torch.testing.assert_close(reward(images, ["", ""], metadata), -(counts - torch.tensor([7.0, 0.0])).abs())


def test_a_class_that_the_model_lacks_is_one_line(yolos):
    reward = build_reward("count", {"count": {"model": yolos}})
    message = error_of(reward, pictures(1), ["two aples"])
    assert "count.model=" in message and "'aple'" in message and "did you mean 'apple'" in message
    assert "it knows person, apple" in error_of(reward, pictures(1), ["two quasars"])
    assert detector_of(yolos).class_of("brown teddy bear") == 4 and detector_of(yolos).class_of("Black Bear") == 3


# ---- preprocessing


@pytest.mark.parametrize("shape", [(64, 64), (70, 200), (200, 70), (50, 60), (64, 300), (97, 131)])
@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_sizes_are_those_of_the_processor(kind, shape, request):
    from transformers import DetrImageProcessorPil, YolosImageProcessorPil

    folder = request.getfixturevalue(kind)
    processor = {"yolos": YolosImageProcessorPil, "detr": DetrImageProcessorPil}[kind].from_pretrained(folder)
    pixels = processor(as_pil(pictures(1, *shape)[0]), return_tensors="pt").pixel_values
    ours = detector_of(folder).preprocess(pictures(1, *shape))
    assert differing(ours, pixels, 0.224) < 2e-2


def test_owlv2_pads_to_a_square():
    text = json.dumps({"size": {"height": 40, "width": 40}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    images = pictures(1, 20, 40)
    pixels = DetectorPreprocess.from_json(text, "owlv2", "")(images) * 0.5 + 0.5
    torch.testing.assert_close(pixels[..., :20, :], images, atol=1e-6, rtol=0)
    assert pixels[..., 20:, :].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("kind", "size", "shape"), [("owlvit", 32, (32, 32)), ("owlvit", [32, 48], (32, 48)), ("yolos", 32, (32, 48))]
)
def test_sizes_as_older_files_write_them(kind, size, shape):
    text = json.dumps({"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert DetectorPreprocess.from_json(text, kind, "").fitted(60, 100) == shape


# ---- what a person can get wrong


def build(model, **options):
    return build_reward("count", {"count": {"model": str(model), **options}})


def test_missing_models_say_what_was_tried(tmp_path):
    for model in ("nobody/absent-model", tmp_path / "absent"):
        message = error_of(build, model)
        assert "count.model=" in message and "no such folder here" in message and "HF_HOME" in message


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("config.json", "no config.json"),
        ("processor", "no processor_config.json"),
        ("model.safetensors", "cannot be loaded as a owlvit model"),
        ("tokenizer_config.json", "no tokenizer_config.json"),
    ],
)
def test_a_missing_file_is_one_line(file, part, owlvit, tmp_path):
    shutil.copytree(owlvit, tmp_path / "copy")
    (tmp_path / "copy" / {"processor": "preprocessor_config.json"}.get(file, file)).unlink()
    assert part in error_of(build, tmp_path / "copy")


@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        ("config.json", {"model_type": "clip"}, "expected a detector: owlvit, owlv2, yolos, detr"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "the model wants 64"),
        ("preprocessor_config.json", {"image_mean": None}, "damaged or not supported"),
        ("preprocessor_config.json", {"resample": 0}, "damaged or not supported"),
    ],
)
def test_files_that_do_not_fit_are_one_line(file, change, part, owlvit, tmp_path):
    shutil.copytree(owlvit, tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert part in error_of(build, tmp_path / "copy")


def test_a_detector_without_all_its_weights_is_refused(yolos, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(yolos, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    weights = load_file(path)
    del weights["bbox_predictor.layers.0.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "lacks 1 weights of a yolos model" in error_of(build, tmp_path / "copy")


def test_both_forms_share_their_options():
    with pytest.raises(RewardError, match=r"^count\.treshold is not an option.*did you mean 'threshold'"):
        build_reward("count_hard", {"count": {"treshold": 0.3}})
