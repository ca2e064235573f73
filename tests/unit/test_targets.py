"""Rewards that compare with a picture of the user's: how that picture is found and read.

Their scores are compared in test_reward_references.
"""

import sys
from functools import partial

import pytest
import torch
from PIL import Image

from alignprop.prompts import load_prompts
from rewards import RewardError, build_reward, options_name
from rewards import target as target_module
from rewards.lpips import NETS, cover
from rewards.target import load_picture
from tests.helpers.refusals import error_of, refusal
from tests.helpers.reward_files import make_clip, make_dinov3, make_options, make_siglip, save_target

pytestmark = pytest.mark.usefixtures("offline")

NAMES = ["clip_image", "dino", "lpips"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def options(folder):
    made = {}
    for name in NAMES:
        (folder / name).mkdir()
        made[name] = make_options(name, folder / name)
    return made


@pytest.fixture(scope="module")
def target(folder):
    return save_target(folder / "target.png", 80, 80)


def build(name, options, **others):
    return build_reward(name, {options_name(name): options[name] | others})


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- the way of a target


@pytest.mark.parametrize("name", NAMES)
def test_the_target_itself_scores_best(name, options, target):
    reward, itself = build(name, options), load_picture(target, "")
    images = torch.cat([itself, (itself + 0.1 * noise(1, 3, 80, 80)).clamp(0, 1), noise(1, 3, 80, 80)])
    scores = reward(images, ["a"] * 3, [{"target": target}] * 3)
    assert scores[0].item() == pytest.approx(0 if name == "lpips" else 1, abs=1e-6)
    assert scores[0] > scores[1:].max() + 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_has_its_own_target(name, options, target, tmp_path):
    reward, other = build(name, options), str(tmp_path / "other.png")
    Image.new("RGB", (90, 60), "red").save(other)
    images = noise(2, 3, 80, 80)
    scores = reward(images, ["a", "b"], [{"target": target}, {"target": other}])
    alone = [reward(images[i : i + 1], ["a"], [{"target": path}]) for i, path in enumerate((target, other))]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-4, atol=1e-6)
    swapped = reward(images, ["a", "b"], [{"target": other}, {"target": target}])
    assert (scores - swapped).abs().min() > 1e-4


def test_a_target_is_read_once_and_again_if_there_are_too_many(options, target, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(target_module, "load_picture", lambda path, prompt: read.append(path) or load_picture(path, ""))
    reward, other = build("lpips", options), str(tmp_path / "other.png")
    Image.new("RGB", (80, 80), "red").save(other)
    score = lambda path, side=80: reward(noise(1, 3, side, side), ["a"], [{"target": path}])  # noqa: E731
    first = score(target)
    assert torch.equal(first, score(target)) and read == [target]
    score(target, 64)
    assert read == [target] * 2  # which is fitted to another size
    monkeypatch.setattr(target_module, "KEPT_BYTES", 3 * 80 * 80 * 4)
    score(other)
    assert len(reward.terms["lpips"].kept) == 1 and torch.equal(first, score(target))


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_target_has_no_graph(name, options, target):
    reward, images = build(name, options), noise(1, 3, 80, 80).requires_grad_()
    reward(images, ["a"], [{"target": target}]).sum().backward()
    assert not any(kept.requires_grad for kept in reward.terms[name].kept.values())
    first, images.grad = images.grad, None
    reward(images, ["a"], [{"target": target}]).sum().backward()
    assert torch.equal(first, images.grad)


def test_transparent_parts_are_white_and_grey_pictures_are_read(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 51).save(tmp_path / "grey.png")
    assert (load_picture(str(tmp_path / "clear.png"), "") == 1).all()
    assert load_picture(str(tmp_path / "grey.png"), "").unique().item() == pytest.approx(0.2)


def test_paths_are_seen_from_the_prompt_file(tmp_path, target, monkeypatch):
    (tmp_path / "pictures").mkdir()
    save_target(tmp_path / "pictures" / "cat.png")
    lines = ["prompt,target", "a cat,pictures/cat.png", f"a dog,{target}", "a bird,bird", "a fish,"]
    (tmp_path / "prompts.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    inside, outside = load_prompts("prompts.csv").metadata, load_prompts(str(tmp_path / "prompts.csv")).metadata
    found = [row["target"] for row in outside]
    assert found == [str(tmp_path / "pictures" / "cat.png"), target, "bird", ""]
    assert [row["target"] for row in inside] == found


def test_errors_name_the_prompt_and_the_file(options, tmp_path):
    reward, images = build("dino", options), noise(1, 3, 80, 80)
    for metadata in (None, [{}], [{"target": " "}], [{"target": 3}]):
        message = error_of(reward, images, ["a cat"], metadata)
        assert "prompt 'a cat'" in message and "metadata 'target' is" in message
    message = error_of(reward, images, ["a cat"], [{"target": "absent.png"}])
    assert "prompt 'a cat'" in message and "target='absent.png' cannot be read" in message
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png" in error_of(reward, images, ["a cat"], [{"target": str(tmp_path / "text.png")}])


def test_dinov3_in_lower_precision_keeps_its_angles_precise(tmp_path, target):
    model = str(make_dinov3(tmp_path / "dinov3"))
    half, whole = (build_reward("dino", {"dino": {"model": model, "dtype": d}}) for d in ("bfloat16", "float32"))
    tower = half.terms["dino"].tower.model
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    angles = [buffer.dtype for name, buffer in tower.named_buffers() if "inv_freq" in name]
    assert angles == [torch.float32]
    call = noise(1, 3, 80, 80), ["a"], [{"target": target}]
    torch.testing.assert_close(half(*call), whole(*call), atol=1e-2, rtol=0)


# ---- LPIPS


def test_lpips_is_finite_where_all_features_are_zero(options, target):
    images = torch.zeros(1, 3, 80, 80, requires_grad=True)
    reward = build("lpips", options)
    for layer in reward.terms["lpips"].tower.features:
        if hasattr(layer, "bias"):
            layer.bias.fill_(-9.0)
    scores = reward(images, ["a"], [{"target": target}])
    assert scores.isfinite().all() and torch.autograd.grad(scores.sum(), images)[0].isfinite().all()


def test_a_target_covers_the_picture_undistorted():
    picture = torch.linspace(0, 1, 60).expand(1, 3, 30, 60)
    assert torch.equal(cover(picture, 30, 40), picture[..., 10:50])
    assert cover(picture, 45, 31).shape == (1, 3, 45, 31) and cover(picture, 10, 64).shape == (1, 3, 10, 64)


# ---- what a person can get wrong


def test_other_models_are_refused(tmp_path):
    assert "dino.model='nobody/absent'" in refusal("dino", model="nobody/absent")
    assert "is a 'clip' model, expected 'dinov2' or 'dinov3_vit'" in refusal(
        "dino", model=str(make_clip(tmp_path / "clip"))
    )
    with pytest.raises(RewardError, match="expected 'clip'"):
        build_reward("clip_image", {"clip": {"model": str(make_siglip(tmp_path / "siglip"))}})


def test_missing_lpips_files_say_where_they_are_from(options, tmp_path, monkeypatch):
    lpips = partial(refusal, "lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    message = lpips()
    assert "alexnet-owt-7be5be79.pth" in message and "https://download.pytorch.org/models/" in message
    monkeypatch.setattr(sys, "path", [])
    assert "pip install --no-deps lpips" in lpips(trunk=options["lpips"]["trunk"])
    assert "did you mean 'vgg'" in lpips(net="vgg16")


def test_lpips_finds_torchs_cache_and_the_package(options, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    trunk = torch.load(options["lpips"]["trunk"])
    torch.save(trunk, tmp_path / "checkpoints" / NETS["alex"].file)
    package = tmp_path / "lpips"
    (package / "weights" / "v0.1").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    torch.save(torch.load(options["lpips"]["lin"]), package / "weights" / "v0.1" / "alex.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    found, metadata = build_reward("lpips", {}), [{"target": save_target(tmp_path / "target.png")}]
    assert torch.equal(
        found(noise(1, 3, 64, 64), [""], metadata), build("lpips", options)(noise(1, 3, 64, 64), [""], metadata)
    )


@pytest.mark.parametrize(
    ("field", "change", "part"),
    [
        ("trunk", {"features.3.weight": None}, "features.3.weight"),
        ("trunk", {"features.6.bias": None}, "no usable 'features.6.bias'"),
        ("trunk", {"features.0.weight": torch.zeros(16, 3, 3, 3)}, "shape [16, 3, 3, 3], expected [16, 3, 11, 11]"),
        ("lin", {"lin2.model.1.weight": None}, "lin2.model.1.weight is None, expected [1, 18, 1, 1]"),
        ("lin", {"lin2.model.1.weight": torch.zeros(1, 3, 1, 1)}, "is [1, 3, 1, 1]"),
    ],
)
def test_lpips_files_of_another_layout_are_one_line(field, change, part, options, tmp_path):
    state = torch.load(options["lpips"][field]) | change
    torch.save({name: weight for name, weight in state.items() if weight is not None}, tmp_path / "broken.pth")
    message = refusal("lpips", **options["lpips"] | {field: str(tmp_path / "broken.pth")})
    assert f"lpips.{field}=" in message and part in message


def test_a_picture_too_small_for_the_network_is_one_line(options, target):
    message = error_of(build("lpips", options), noise(1, 3, 30, 80), ["a"], [{"target": target}])
    assert "31 pixels a side or more, not of 30 x 80" in message
