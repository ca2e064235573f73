import math

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop.evaluation.pictures import (
    draw_grid,
    plot_curves,
    plot_soup,
    read_grid,
    save_before_after,
    save_grid,
    save_image,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(*colours, side=64):
    """Pictures of one colour each, float [B, 3, side, side]."""
    return (torch.tensor(colours) / 255).view(-1, 3, 1, 1).expand(-1, 3, side, side)


def colour_blocks(grid):
    """For each colour, the box (left, top, right, bottom) of the pixels that have exactly it."""
    pixels, boxes = np.asarray(grid.convert("RGB")), {}
    for colour in (RED, GREEN, BLUE):
        rows, columns = np.nonzero((pixels == colour).all(-1))
        if len(rows):
            boxes[colour] = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert len(rows) == (boxes[colour][2] - boxes[colour][0]) * (boxes[colour][3] - boxes[colour][1])
    return boxes


def ink(grid, box):
    """How many pixels of the box are not white."""
    left, top, right, bottom = box
    return int((np.asarray(grid.convert("RGB"))[top:bottom, left:right] != 255).any(-1).sum())


# ---- pictures


def test_one_picture_survives_the_file_to_half_a_grey_level(tmp_path):
    image = torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(0))
    save_image(image, tmp_path / "new folder" / "image.png")
    with Image.open(tmp_path / "new folder" / "image.png") as file:
        assert file.format == "PNG" and file.size == (40, 24)
        read = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    assert (read - image * 255).abs().max() <= 0.5 + 1e-4


def test_values_out_of_range_are_clamped_and_nan_is_black(tmp_path):
    save_image(torch.tensor([-1.0, 2.0, math.nan]).view(1, 3, 1).expand(3, 3, 1), tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as file:
        assert np.array(file)[:, 0].tolist() == [[0, 0, 0], [255, 255, 255], [0, 0, 0]]


def test_grid_places_pictures_row_by_row_with_text_under_them(tmp_path):
    save_grid(flat(RED, GREEN, BLUE), ["a red cat", "", "a blue cat"], tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as grid:
        boxes = colour_blocks(grid)
        red, green, blue = (boxes[colour] for colour in (RED, GREEN, BLUE))
        assert all(box[2] - box[0] == box[3] - box[1] == 128 for box in boxes.values())  # 64 enlarged to be readable
        assert red[1] == green[1] and red[2] < green[0]
        assert blue[0] == red[0] and blue[1] > red[3]
        assert ink(grid, (red[0], red[3], red[2], blue[1])) > 50
        assert ink(grid, (green[0], green[3], green[2], blue[1])) == 0
        assert ink(grid, (blue[0], blue[3], blue[2], grid.height)) > 50
        assert ink(grid, (green[0], blue[1], grid.width, grid.height)) == 0


def test_pictures_are_found_again_in_a_grid_with_their_labels(tmp_path):
    labels = ["a red cat\n1.50", "熊 →", 'a "blue" cat']
    save_grid(flat(RED, GREEN, BLUE), labels, tmp_path / "grid.png", columns=2)
    found = read_grid(tmp_path / "grid.png")
    assert [label for label, _ in found] == labels
    for (_, picture), colour in zip(found, (RED, GREEN, BLUE), strict=True):
        assert picture.size == (128, 128) and picture.getcolors() == [(128 * 128, colour)]
    save_image(flat(RED)[0], tmp_path / "image.png")
    assert read_grid(tmp_path / "image.png") == []


def test_pictures_of_several_sizes_keep_their_shapes(tmp_path):
    wide, high = flat(RED)[0][:, :20, :40], flat(GREEN)[0][:, :40, :20]
    save_grid([wide, high], ["wide", "high"], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        boxes = colour_blocks(grid)
    sizes = [(right - left, bottom - top) for left, top, right, bottom in (boxes[RED], boxes[GREEN])]
    assert sizes == [(280, 140), (140, 280)]
    found = read_grid(tmp_path / "grid.png")
    assert [(label, picture.size) for label, picture in found] == list(zip(("wide", "high"), sizes, strict=True))
    save_before_after([wide, high], [high, wide], ["a", "b"], tmp_path / "pair.png")
    assert [picture.size for _, picture in read_grid(tmp_path / "pair.png")] == [*sizes, *sizes[::-1]]


def test_large_pictures_keep_their_pixels():
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 0.9
    grid = np.asarray(draw_grid(image, [""]))
    rows, columns = np.nonzero((grid != 255).any(-1))
    cut = grid[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert np.abs(cut - image[0].permute(1, 2, 0).numpy() * 255).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("side", [64, 512])
def test_a_long_prompt_is_wrapped_shortened_and_keeps_its_score(side):
    """However long the prompt, the text stays under its own picture, and a score on a line of its own is drawn."""
    images = flat(RED, GREEN, side=side)
    short = draw_grid(images, ["word " * 500, ""])
    scored = draw_grid(images, ["word " * 500 + "\n0.28", ""])
    unbroken = draw_grid(images, ["w" * 500, ""])
    red, green = colour_blocks(short)[RED], colour_blocks(short)[GREEN]
    assert short.height < red[3] + 5.5 * max(16, side / 14)
    assert ink(short, (red[0], red[3], red[2], short.height)) > 100
    assert scored.height > short.height > unbroken.height
    for grid in (short, scored, unbroken):
        assert ink(grid, (red[2], red[3], grid.width, grid.height)) == 0
        assert ink(grid, (0, red[3], red[0], grid.height)) == 0
    score = (red[0], short.height - 6, red[2], scored.height)
    assert ink(scored, score) > 10
    assert ink(scored, (red[0], red[3], red[2], scored.height)) > ink(short, (red[0], red[3], red[2], short.height))
    assert green[0] > red[2]


def test_letters_outside_ascii_are_drawn_as_themselves():
    """A font without a letter draws the same empty box for all of them."""
    grids = [draw_grid(flat(RED), [letter]) for letter in ("→", "λ", "Ж", "é")]
    assert len({grid.tobytes() for grid in grids}) == 4


def test_before_is_above_after(tmp_path):
    save_before_after(flat(RED, RED), flat(BLUE, BLUE), ["5.0 → 7.0"] * 2, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as file:
        grid = file.convert("RGB")
    pixels = np.asarray(grid)
    red_rows, red_columns = np.nonzero((pixels == RED).all(-1))
    blue_rows, blue_columns = np.nonzero((pixels == BLUE).all(-1))
    assert len(red_rows) == len(blue_rows) == 2 * 128 * 128
    assert red_rows.max() < blue_rows.min()
    assert set(red_columns) == set(blue_columns)
    assert ink(grid, (0, red_rows.min(), red_columns.min(), red_rows.max())) > 20  # "before"
    assert ink(grid, (0, blue_rows.min(), blue_columns.min(), blue_rows.max())) > 20  # "after"
    assert ink(grid, (red_columns.min(), red_rows.max() + 1, grid.width, blue_rows.min())) == 0
    assert ink(grid, (red_columns.min(), blue_rows.max() + 1, grid.width, grid.height)) > 50


@pytest.mark.parametrize(
    ("images", "labels"),
    [(flat(RED), []), (flat(RED), ["a", "b"]), (flat(RED)[0], ["a"] * 3), (flat(RED)[:0], [])],
)
def test_a_grid_that_does_not_fit_its_labels_is_refused(images, labels):
    with pytest.raises(ValueError, match="labels"):
        draw_grid(images, labels)


# ---- curves


@pytest.fixture
def drawn(plots, monkeypatch):
    """Collects, per saved figure, {panel title: (x, y)}."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def spy(figure, *args, **kwargs):
        figures.append({axis.get_title(): tuple(axis.lines[0].get_data()) for axis in figure.axes})
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def eval_row(step, reward, **rewards):
    return {"kind": "eval", "step": step, "epoch": 0, "reward": reward, "rewards": rewards}


def train_row(step, reward, grad_norm=1.0, **others):
    return {"kind": "train", "step": step, "epoch": 0, "reward": reward, "grad_norm": grad_norm, **others}


def test_curves_have_a_panel_for_everything_that_the_rows_hold(tmp_path, drawn):
    rows = [
        eval_row(0, 5.0, aesthetic=5.0, clip=0.3),
        train_row(1, 5.5, grad_norm=2.0, adjoint_norm=[None, 9.0]),
        train_row(2, None, grad_norm=None, adjoint_norm=[None, 0.5]),
        eval_row(2, 6.0, aesthetic=6.0, clip=0.2),
    ]
    plot_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as file:
        assert file.format == "PNG"
    expected = {
        "training reward": ([1, 2], [5.5, math.nan]),
        "held-out reward": ([0, 2], [5.0, 6.0]),
        "held-out aesthetic": ([0, 2], [5.0, 6.0]),
        "held-out clip": ([0, 2], [0.3, 0.2]),
        "gradient norm": ([1, 2], [2.0, math.nan]),
        "adjoint norm at step 2": ([0, 1], [math.nan, 0.5]),
    }
    assert list(drawn[0]) == list(expected)
    for title, (x, y) in expected.items():
        np.testing.assert_array_equal(drawn[0][title][0], x)
        np.testing.assert_array_equal(drawn[0][title][1], y)


def test_other_measures_have_their_panels(tmp_path, drawn):
    rows = [eval_row(step, 5.0, clip=5.0) | {"diversity": 0.25, "base_distance": step} for step in (0, 2)]
    plot_curves(rows, tmp_path / "curves.png")
    assert list(drawn[0]) == ["held-out reward", "held-out diversity", "held-out base distance"]
    np.testing.assert_array_equal(drawn[0]["held-out base distance"], ([0, 2], [0, 2]))


def test_each_size_has_a_curve(tmp_path, drawn):
    rows = [eval_row(0, 5.0, aesthetic=5.0) | {"reward_by_size": {"16": 4.0, "24x16": 6.0}}]
    rows += [train_row(step, reward) | {"reward_by_size": {size: reward}} for step, reward, size in [
        (1, 5.0, "16"), (2, 7.0, "24x16"), (3, 6.0, "16")]]  # fmt: skip
    plot_curves(rows, tmp_path / "curves.png")
    titles = ["training reward, 16", "training reward, 24x16", "held-out reward", "held-out reward, 16"]
    assert list(drawn[0])[:5] == [*titles, "held-out reward, 24x16"]
    np.testing.assert_array_equal(drawn[0]["training reward, 16"], ([1, 3], [5.0, 6.0]))


def test_a_single_held_out_reward_is_drawn_once(tmp_path, drawn):
    plot_curves([eval_row(0, 5.0, aesthetic=5.0)], tmp_path / "curves.png")
    assert list(drawn[0]) == ["held-out reward"]


@pytest.mark.parametrize("rows", [[], [train_row(1, None, grad_norm=None)]])
def test_without_a_number_there_is_no_figure(tmp_path, rows):
    plot_curves(rows, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_soup_is_drawn_in_order_of_its_coefficient(tmp_path, drawn):
    results = {"aesthetic": [(7.0, 0.1), (5.0, 0.1), (6.0, 0.1)], "clip": [(0.1, 0.0), (0.3, 0.0), (0.2, 0.0)]}
    plot_soup([1.0, 0.0, 0.5], results, tmp_path / "soup.png")
    with Image.open(tmp_path / "soup.png") as file:
        assert file.format == "PNG"
    assert list(drawn[0]) == ["aesthetic", "clip"]
    for name, expected in (("aesthetic", [5.0, 6.0, 7.0]), ("clip", [0.3, 0.2, 0.1])):
        np.testing.assert_array_equal(drawn[0][name][0], [0.0, 0.5, 1.0])
        np.testing.assert_array_equal(drawn[0][name][1], expected)
