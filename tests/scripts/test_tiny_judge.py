"""The independent judge: reads prompts, judges drawn scenes, and refuses what it cannot read."""

import pytest
import torch

from rewards import RewardError, tiny_judge
from scripts.tiny import world


@pytest.fixture(scope="module")
def scenes():
    generator = torch.Generator().manual_seed(77)
    contents = world.all_contents()[::4]
    styles = world.sample_styles(len(contents), generator)
    images = world.to_float(world.draw(contents, styles, generator))
    return images, [world.caption(row) for row in contents], styles


def test_every_prompt_is_read_back_as_its_content():
    config = tiny_judge.load().config
    contents = world.all_contents()
    assert [tiny_judge.parse(world.caption(row), config) for row in contents] == contents.tolist()


@pytest.mark.parametrize(
    "prompt",
    ["a dog", "", "four red circles on a blue background", "a pink circle on a blue background",
     "a red circle on a blue background, glossy", "a red circle on a black background",
     "a red hexagon on a blue background"],
)  # fmt: skip
def test_a_prompt_outside_the_grammar_is_refused_in_one_line(prompt):
    with pytest.raises(RewardError, match="the judge reads only") as refused:
        tiny_judge.obedience(torch.rand(1, 3, 64, 64), [prompt], [{}])
    assert repr(prompt) in str(refused.value) and "backgrounds red/" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_drawn_scenes_are_obedient(scenes):
    images, prompts, _ = scenes
    scores = tiny_judge.obedience(images, prompts, None)
    assert scores.shape == (len(images),)
    assert scores.mean() >= 0.98


def test_the_wrong_prompt_is_disobeyed_in_the_word_that_is_wrong(scenes):
    images, prompts, _ = scenes
    wrong = [p.replace("circle", "SHAPE").replace("square", "circle").replace("SHAPE", "square") for p in prompts]
    changed = torch.tensor([a != b for a, b in zip(prompts, wrong, strict=True)])
    assert changed.sum() > 20
    right = tiny_judge.content_right(images, wrong)
    assert right["shape"][changed].float().mean() <= 0.02
    for name in ("count", "colour", "background"):
        assert right[name].float().mean() >= 0.98
    assert tiny_judge.obedience(images, wrong, None)[changed].mean() <= 0.02


def test_a_picture_of_too_many_shapes_is_wrong():
    generator = torch.Generator().manual_seed(5)
    contents = torch.tensor([[3, 0, s, 4] for s in range(3)] * 8)
    images = world.to_float(world.draw(contents, world.sample_styles(24, generator), generator))
    prompts = ["three red " + world.SHAPES[s] + "s on a blue background" for s in contents[:, 2]]
    right = tiny_judge.content_right(images, prompts)
    assert right["count"].float().mean() <= 0.05
    assert right["shape"].float().mean() >= 0.95


def test_the_rating_follows_the_styles_that_were_drawn(scenes):
    images, prompts, styles = scenes
    rating = tiny_judge.rating(images, prompts, None)
    assert (rating - world.rating(styles)).abs().mean() < 0.3
    assert rating.min() >= 1
    assert rating.max() <= 10


def test_larger_pictures_are_judged_too(scenes):
    images, prompts, _ = scenes
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    assert tiny_judge.obedience(larger, prompts, None).mean() >= 0.97


def test_both_are_marked_as_not_for_training():
    assert tiny_judge.rating.differentiable is False
    assert tiny_judge.obedience.differentiable is False
