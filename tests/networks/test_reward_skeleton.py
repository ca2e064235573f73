"""Rewards without weights: of the same shapes as the real ones, and with a gradient at full size without memory."""

import pytest
import torch

from alignprop.models.configs import find_tower_config
from config.align_prop import base
from rewards import REWARDS, build_reward, options_name, reward_class
from rewards.base import BlankReward
from rewards.skeleton import skeleton_reward, without_custom
from tests.helpers.detector_files import make_yolos
from tests.helpers.reward_files import make_dinov3, make_options

# Those without a gradient have tests of their own.
NAMES = [name for name in REWARDS if reward_class(name).plannable and reward_class(name).differentiable]
# Million parameters, of towers and head.
FULL_SIZE = {
    "aesthetic": 304.9, "aesthetic_v2_5": 429.5, "hps": 986.1, "hpsv3": 7748.6, "pickscore": 986.1,
    "imagereward": 446.2, "cyclereward": 446.2, "mps": 1104.6, "clip": 427.6, "siglip": 203.2, "vqascore": 8292.2,
    "clip_image": 304.0, "dino": 22.1, "lpips": 2.5,
}  # fmt: skip


def test_every_reward_with_towers_has_a_skeleton():
    assert set(NAMES) == set(FULL_SIZE)


def full_size(name, **options):
    c = base()
    group = options_name(name)
    return skeleton_reward(name, {group: c[group].to_dict() | options}, tower_config_of)


def tower_config_of(*which):
    return {k: v for k, v in find_tower_config(*which)["model"].items() if k != "_class_name"}


@pytest.mark.parametrize("name", NAMES)
def test_a_full_size_reward_needs_no_memory(name):
    reward = full_size(name)
    assert sum(p.numel() for p in reward.parameters()) / 1e6 == pytest.approx(FULL_SIZE[name], abs=0.06)
    assert {t.device.type for t in [*reward.parameters(), *reward.buffers()]} == {"meta"}
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_skeleton_of_dinov3_has_the_layers_that_are_loaded(tmp_path):
    folder = str(make_dinov3(tmp_path / "dinov3"))
    real, plan = build_reward("dino", {"dino": {"model": folder}}), full_size("dino", model=folder)
    shapes = [{name: tensor.shape for name, tensor in reward.named_parameters()} for reward in (real, plan)]
    assert shapes[0] == shapes[1] and any("register_tokens" in name for name in shapes[0])
    images = torch.zeros(2, 3, 96, 64, device="meta", requires_grad=True)
    assert torch.autograd.grad(plan(images, ["", ""]).sum(), images)[0].shape == images.shape


# The language model, the projection, and all but the last of the 24 layers of CLIP.
@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("zhiqiulin/clip-flant5-xl", 3147.0),
        ("zhiqiulin/clip-flant5-xxl", 11447.2),
        ("llava-hf/llava-1.5-7b-hf", 7050.8),
        ("llava-hf/llava-1.5-13b-hf", 13338.9),
    ],
)
def test_vqascore_has_more_models_of_full_size(model, millions):
    reward = full_size("vqascore", model=model)
    assert sum(p.numel() for p in reward.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    images = torch.zeros(2, 3, 512, 512, device="meta", requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(images, ["a cat", "a dog"]).sum(), images)
    assert gradient.shape == images.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_full_size_reward_has_a_gradient_without_memory(name):
    reward = full_size(name)
    images = torch.zeros(2, 3, 512, 512, device="meta", requires_grad=True)
    scores = reward(images, ["a cat", "a dog"])
    assert scores.shape == (2,) and scores.dtype == torch.float32
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.shape == images.shape


@pytest.mark.parametrize("name", NAMES)
def test_precision_is_that_of_the_option(name):
    reward = full_size(name, dtype="bfloat16")
    halves = {p.dtype for key, p in reward.named_parameters() if ".head." not in key}
    assert halves == {torch.bfloat16}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lpips"])  # whose files here are narrow
def test_a_skeleton_has_the_shapes_of_the_reward(name, tmp_path):
    real = build_reward(name, {options_name(name): make_options(name, tmp_path)})
    (term,) = real.terms.values()
    tower = term.blip if hasattr(term, "blip") else term.tower
    if hasattr(term, "blip"):
        config = {"vision_config": tower.vision_model.config, "text_config": tower.text_encoder.config}
        config = {part: values.to_dict() for part, values in config.items()}
    else:
        config = tower.model.config.to_dict()
    options = {"model": "x", "clip": "x", "dtype": "float32"}
    blank = skeleton_reward(name, {options_name(name): options}, lambda *which: config)
    describe = lambda reward: {k: (p.shape, p.dtype) for k, p in reward.named_parameters() if "head" not in k}  # noqa: E731
    assert describe(blank) == describe(real)
    (other,) = blank.terms.values()
    blank_tower = other.blip if hasattr(term, "blip") else other.tower
    assert type(blank_tower.preprocess) is type(tower.preprocess)


def test_geneval_is_planned_with_both_networks_and_without_a_gradient():
    reward = full_size("geneval", dtype="bfloat16")
    halves = {p.dtype for key, p in reward.named_parameters() if ".tower." in key}
    assert halves == {torch.bfloat16} and not any(p.requires_grad for p in reward.parameters())
    assert sum(p.numel() for p in reward.parameters()) / 1e6 == pytest.approx(427.6 + 68.7, abs=0.1)
    scores = reward(torch.zeros(2, 3, 512, 512, device="meta"), ["a cat", "a dog"])
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores.is_meta


def test_a_plan_of_geneval_has_the_bytes_of_the_reward(tmp_path):
    options = make_options("geneval", tmp_path)
    real = build_reward("geneval", {"geneval": options})
    blank = skeleton_reward("geneval", {"geneval": options}, tower_config_of)
    describe = lambda reward: {k: (v.shape, v.dtype) for k, v in reward.state_dict().items()}  # noqa: E731
    assert describe(blank) == describe(real)
    boxes = str(make_yolos(tmp_path / "yolos"))
    blank = skeleton_reward("geneval", {"geneval": {**options, "model": boxes}}, tower_config_of)
    assert not any(".finder." in name for name in blank.state_dict()), "as with count, it is not counted"


def test_what_is_not_ours_is_blank():
    reward = build_reward("tests.helpers.toy_rewards:redness,jpeg_proxy")
    assert all(isinstance(term, BlankReward) for term in without_custom(reward).terms.values())
    pick = full_size("pickscore")
    assert without_custom(pick).terms["pickscore"] is pick.terms["pickscore"]
