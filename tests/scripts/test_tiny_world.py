"""The drawn world: its grammar, its geometry, and that each style changes the picture as it says."""

import pytest
import torch

from scripts.tiny import world

PLAIN = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # full colours, nothing else


def drawings(contents, styles=PLAIN, seed=0):
    contents = torch.as_tensor(contents)
    styles = styles.expand(len(contents), 4)
    return world.to_float(world.draw(contents, styles, torch.Generator().manual_seed(seed)))


def shape_mask(image, colour, background):
    """Pixels nearer to the shapes' colour than to the background's, [64, 64] bool."""
    rgb = torch.tensor(list(world.COLOURS.values())) / 255
    distance = lambda i: (image - rgb[i][:, None, None]).square().sum(0)  # noqa: E731
    return distance(colour) < distance(background)


def components(mask):
    """The connected regions of a mask, as a list of [pixels, 2] index tensors."""
    todo, found = {tuple(p) for p in mask.nonzero().tolist()}, []
    while todo:
        stack, region = [todo.pop()], []
        while stack:
            row, column = stack.pop()
            region.append((row, column))
            for near in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if near in todo:
                    todo.remove(near)
                    stack.append(near)
        found.append(torch.tensor(region))
    return found


def test_captions_read_as_english():
    assert world.caption((0, 1, 1, 0)) == "an orange square on a red background"
    assert world.caption((1, 0, 0, 4)) == "two red circles on a blue background"
    assert world.caption((2, 7, 2, 1), "glossy") == "three black triangles on an orange background, glossy"


def test_prompts_are_split_by_pairs_of_colour_and_shape():
    train, heldout = world.prompts(False), world.prompts(True)
    assert len(train) == 333
    assert len(heldout) == 108
    assert not set(train) & set(heldout)
    assert not any("red triangle" in p or "blue circle" in p for p in train)
    assert any("red triangles" in p for p in heldout)


def test_no_colour_lies_on_itself():
    contents = world.sample_contents(500, torch.Generator().manual_seed(0))
    assert (contents[:, 1] != contents[:, 3]).all()
    share = (contents[:, 0] == 3).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.05)


def test_the_rating_is_the_stated_formula():
    styles = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [2, 1, 1, 1]])
    expected = torch.tensor([1.0, 4.6, 3.25, 2.8, 2.35, 10.0])
    torch.testing.assert_close(world.rating(styles), expected)


def test_the_same_seed_draws_the_same_pictures():
    contents = world.sample_contents(8, torch.Generator().manual_seed(3))
    assert torch.equal(drawings(contents, seed=1), drawings(contents, seed=1))
    assert not torch.equal(drawings(contents, seed=1), drawings(contents, seed=2))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [0, 1, 2])
def test_as_many_shapes_as_named_and_apart(count, shape):
    for image in drawings([(count, 0, shape, 4)] * 12):
        regions = components(shape_mask(image, 0, 4))
        assert len(regions) == count + 1 or (count == 3 and len(regions) == 5)


@pytest.mark.parametrize(("shape", "expected"), [(0, 0.785), (1, 0.91), (2, 0.51)])
def test_shapes_fill_their_bounding_box_as_they_should(shape, expected):
    fills = []
    for image in drawings([(0, 0, shape, 4)] * 16):
        (region,) = components(shape_mask(image, 0, 4))
        height, width = (region.amax(0) - region.amin(0) + 1).tolist()
        fills.append(len(region) / (height * width))
        assert height == pytest.approx(width, rel=0.25)
    assert sum(fills) / len(fills) == pytest.approx(expected, abs=0.05)


def test_each_style_changes_the_picture_as_it_says():
    contents = [(0, 0, 0, 3)] * 8  # one red circle on green
    plain = drawings(contents)
    styled = {name: drawings(contents, PLAIN + torch.eye(4)[i : i + 1]) for i, name in enumerate(world.STYLES) if i}
    masks = torch.stack([shape_mask(image, 0, 3) for image in plain])[:, None]
    assert styled["gloss"].amin(1, keepdim=True)[masks].max() > 0.6 > plain.amin(1, keepdim=True)[masks].max()
    rows = torch.arange(64)[:, None].expand(64, 64)
    lowest = (rows * masks).amax((2, 3), keepdim=True)
    below = ~masks & (rows > lowest) & (rows <= lowest + 3) & (masks.any(2, keepdim=True))
    assert (plain - styled["shadow"]).mean(1, keepdim=True)[below].mean() > 0.1
    assert (styled["light"] - plain)[:, :, 0].mean() > 0.1
    assert (styled["light"] - plain)[:, :, -1].mean() < -0.1
    faded = drawings(contents, torch.zeros(1, 4))
    saturation = lambda x: (x.amax(1) - x.amin(1)).mean()  # noqa: E731
    assert saturation(faded) < 0.6 * saturation(plain)


def test_left_and_right_are_alike():
    contents = [(1, 0, 1, 4)] * 400
    masks = torch.stack([shape_mask(image, 0, 4) for image in drawings(contents)]).float().mean(0)
    torch.testing.assert_close(masks, masks.flip(1), atol=0.12, rtol=0)
    assert masks.max() > 0.3


def test_crowds_are_pictures_of_many_edges():
    crowds = world.to_float(world.draw_crowds(16, torch.Generator().manual_seed(0)))
    assert crowds.shape == (16, 3, 64, 64)
    scenes = drawings(world.sample_contents(16, torch.Generator().manual_seed(0)))
    edges = lambda x: x.diff(dim=3).abs().mean()  # noqa: E731
    assert edges(crowds) > 1.3 * edges(scenes)
