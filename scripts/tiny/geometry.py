"""Measures on the pixels how well a single shape is drawn: roundness of circles, corners of squares.

The figure is cut out by its colour. Shading and shadows change colours, so pictures in which the judge sees gloss or a
shadow are left out (evaluate.py). On a picture drawn by ``world.draw``, the result is the error of the measure itself.
"""

import math

import torch
from torch.nn.functional import grid_sample

ANGLES = 720  # rays from the figure's centre
SECTORS = 16
STEPS_PER_PIXEL = 8


def outline(picture: torch.Tensor) -> torch.Tensor:
    """Returns the outline of the figure in one picture [3, H, W]: its radius in pixels on ``ANGLES`` rays, [ANGLES].

    The centre is the figure's centre of mass. The outline is where a pixel is half figure, half background.
    """
    covered = _coverage(picture)
    rows, columns = (torch.arange(n) + 0.5 for n in covered.shape)
    mass = covered.sum()
    centre_row, centre_column = (covered.sum(1) * rows).sum() / mass, (covered.sum(0) * columns).sum() / mass
    angles = torch.arange(ANGLES) * 2 * math.pi / ANGLES
    distances = torch.arange(0, min(covered.shape) / 2, 1 / STEPS_PER_PIXEL)
    x = (centre_column + angles.cos()[:, None] * distances) / covered.shape[1] * 2 - 1
    y = (centre_row + angles.sin()[:, None] * distances) / covered.shape[0] * 2 - 1
    profile = grid_sample(
        covered[None, None], torch.stack([x, y], -1)[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0, 0]
    outside = profile < 0.5
    first = torch.where(outside.any(1), outside.int().argmax(1), len(distances) - 1)
    return distances[first]


def _coverage(picture):
    """Returns how much of each pixel the figure covers, [H, W] in [0, 1].

    The background's colour changes from row to row (light from above) and is read at the two ends of each row.
    """
    edge = picture.shape[2] // 10
    background = torch.cat([picture[:, :, :edge], picture[:, :, -edge:]], 2).mean(2, keepdim=True)  # [3, H, 1]
    contrast = (picture - background).norm(dim=0)
    inside = contrast > 0.6 * contrast.quantile(0.97)
    figure = torch.stack([channel[inside].median() for channel in picture])[:, None, None]
    towards = figure - background
    return (((picture - background) * towards).sum(0) / towards.square().sum(0).clamp(min=1e-6)).clamp(0, 1)


def radial_deviation(picture: torch.Tensor) -> float:
    """Returns the mean absolute deviation of the radii in 16 sectors, relative to the mean radius.

    It is 0 for a perfect circle. It is infinite if the figure does not cover its own centre, as with two figures.
    """
    radii = outline(picture)
    if radii.min() == 0:
        return math.inf
    sectors = radii.view(SECTORS, -1).square().mean(1).sqrt()  # the radius of a disc with the sector's area
    return ((sectors - sectors.mean()).abs().mean() / sectors.mean()).item()


def corner_error(picture: torch.Tensor) -> float:
    """Returns by how many degrees the worst corner of a square differs from 90; infinite as in `radial_deviation`.

    The angle is measured between the two sides that meet at the corner. The direction of a side is taken between a
    tenth and two fifths of its length. So a rounded tip does not count, but a side that bulges or caves in does.
    """
    radii = outline(picture)
    if radii.min() == 0:
        return math.inf
    angles = torch.arange(ANGLES) * 2 * math.pi / ANGLES
    points = torch.stack([radii * angles.cos(), radii * angles.sin()], 1)
    corners = _corners(radii)
    errors = []
    for k, corner in enumerate(corners):
        directions = []
        for neighbour, sign in ((corners[k - 1], -1), (corners[(k + 1) % 4], 1)):
            side = (sign * (neighbour - corner)) % ANGLES
            near, far = (points[(corner + sign * round(share * side)) % ANGLES] for share in (0.1, 0.4))
            directions.append((far - near) / (far - near).norm())
        angle = math.degrees(math.acos((directions[0] @ directions[1]).clamp(-1, 1)))
        errors.append(abs(angle - 90))
    return max(errors)


def _corners(radii):
    """Returns the rays to the four corners of a square, in order."""
    quarter, window = ANGLES // 4, 9
    padded = torch.cat([radii[-(window // 2) :], radii, radii[: window // 2]])
    smooth = padded.unfold(0, window, 1).mean(1)
    start = smooth.view(4, quarter).sum(0).argmax().item()  # four rays, a quarter turn apart, are longest here
    near = torch.arange(-quarter // 3, quarter // 3)
    around = [(start + k * quarter + near) % ANGLES for k in range(4)]
    return [rays[smooth[rays].argmax()].item() for rays in around]


def summary(pictures: torch.Tensor, measure) -> dict[str, float]:
    """Returns the median and the ninth decile of a measure over pictures [N, 3, H, W], and the number of pictures."""
    values = torch.tensor([measure(picture) for picture in pictures])
    return {
        "pictures": len(values),
        "median": values.median().item(),
        "nine_of_ten_below": values.sort().values[math.ceil(0.9 * len(values)) - 1].item(),
    }
