"""The measures of how well a shape is drawn, on drawings whose error is known."""

import math

import pytest
import torch

from scripts.tiny import geometry, world

YELLOW, BLUE = torch.tensor([1.0, 0.9, 0.2]), torch.tensor([0.1, 0.4, 0.9])


def painted(radius_at, size=64, centre=(30.0, 33.0)):
    """A yellow figure on blue, its outline at ``radius_at(angle)`` pixels from the centre."""
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    y, x = rows - centre[0], columns - centre[1]
    covered = (radius_at(torch.atan2(y, x)) - (x * x + y * y).sqrt() + 0.5).clamp(0, 1)
    return YELLOW[:, None, None] * covered + BLUE[:, None, None] * (1 - covered)


def drawn(shape, n=12):
    contents = world.all_contents(1)
    contents = contents[contents[:, 2] == world.SHAPES.index(shape)][:n]
    styles = torch.zeros(len(contents), 4)
    return world.to_float(world.draw(contents, styles, torch.Generator().manual_seed(3)))


def test_drawn_circles_are_round_and_drawn_squares_have_right_angles():
    assert max(geometry.radial_deviation(picture) for picture in drawn("circle")) < 0.005
    assert max(geometry.corner_error(picture) for picture in drawn("square")) < 4


@pytest.mark.parametrize("amount", [0.02, 0.05, 0.1])
def test_a_wave_in_the_radius_is_measured(amount):
    picture = painted(lambda angle: 16 * (1 + amount * (3 * angle).cos()))
    sectors = torch.linspace(0, 2 * math.pi, 1600)[:-1]
    expected = amount * (3 * sectors).cos().abs().mean().item() * math.sin(3 * math.pi / 16) / (3 * math.pi / 16)
    assert geometry.radial_deviation(picture) == pytest.approx(expected, rel=0.08)


def square(bulge, half=13.0):
    """Radius of the outline at an angle: a square whose corners are ``bulge`` further out than a square's."""

    def radius_at(angle):
        off = (torch.remainder(angle, math.pi / 2) - math.pi / 4).abs()  # from the nearest corner
        return half / (math.pi / 4 - off).cos() * (1 + bulge * (1 - off / (math.pi / 4)))

    return radius_at


def test_straight_sides_are_right_angles_and_sides_that_bulge_or_cave_in_are_not():
    straight, pincushion, barrel = (geometry.corner_error(painted(square(bulge))) for bulge in (0.0, 0.15, -0.15))
    assert straight < 3
    assert pincushion > 12 and barrel > 12


def test_two_figures_are_no_circle():
    both = torch.maximum(painted(lambda angle: 0 * angle + 8, centre=(32, 15)),
                         painted(lambda angle: 0 * angle + 8, centre=(32, 49)))  # fmt: skip
    assert geometry.radial_deviation(both) == math.inf


def test_the_summary_names_the_ninth_of_ten():
    values = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0])
    found = geometry.summary(torch.zeros(10, 3, 4, 4), lambda picture: next(values))
    assert found == {"pictures": 10, "median": pytest.approx(0.5), "nine_of_ten_below": pytest.approx(0.9)}
