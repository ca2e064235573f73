"""The drawn world: 64 x 64 pictures with a content, which prompts name, and a style, which prompts never name.

Content, a row of four indices (count, colour, shape, background):
    "two red circles on a blue background"
Style, four amounts in [0, 1]: vivid (washed out .. full colour), gloss (ball-like shading and a highlight),
shadow (a soft shadow below each shape), light (background lit from above). The rating of a picture is
``1 + 9 * (.40 vivid + .25 gloss + .20 shadow + .15 light)``.

A quarter of the (colour, shape) pairs is held out of every alignment run, so that there are prompts that an aligned
model was never trained on. The base model has seen all pairs. Layouts are mirrored at random.
"""

import torch

SIZE = 64
COLOURS = {
    "red": (218, 30, 44), "orange": (255, 132, 12), "yellow": (255, 226, 48), "green": (30, 165, 75),
    "blue": (35, 95, 230), "purple": (145, 50, 190), "white": (248, 248, 248), "black": (22, 22, 26),
}  # fmt: skip
COLOUR_NAMES = list(COLOURS)
BACKGROUNDS = COLOUR_NAMES[:-1]  # no black background: a shadow has to be visible on every one
SHAPES = ["circle", "square", "triangle"]
COUNTS = ["one", "two", "three", "four or more"]  # the last for the judge and the CLIP only: no prompt asks for it
STYLES = ["vivid", "gloss", "shadow", "light"]
STYLE_WEIGHTS = [0.40, 0.25, 0.20, 0.15]
STYLE_WORDS = [("vivid", "faded"), ("glossy", "flat"), ("shadowed", "shadowless"), ("lit", "plain")]
STYLE_PRESENT = torch.tensor([0.6, 0.3, 0.3, 0.3])  # the amount from which a caption may say the first word
HELD_OUT_PAIRS = {
    ("red", "triangle"), ("blue", "circle"), ("green", "square"),
    ("yellow", "triangle"), ("purple", "circle"), ("orange", "square"),
}  # fmt: skip

_RGB = torch.tensor(list(COLOURS.values())) / 255
_GREY = torch.tensor([0.70, 0.69, 0.675])  # what a washed-out colour fades to
_FADE = 0.62  # how far it fades at vivid = 0
_ROWS, _COLUMNS = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
# Centres as fractions of the picture, three layouts for each number of shapes, one of them drawn at random.
_LAYOUTS = {
    1: [[(0.5, 0.5)]] * 3,
    2: [[(0.28, 0.5), (0.72, 0.5)], [(0.3, 0.3), (0.7, 0.7)], [(0.5, 0.27), (0.5, 0.73)]],
    3: [[(0.5, 0.27), (0.25, 0.72), (0.75, 0.72)], [(0.25, 0.28), (0.75, 0.28), (0.5, 0.73)],
        [(0.22, 0.22), (0.5, 0.5), (0.78, 0.78)]],
    4: [[(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], [(0.5, 0.2), (0.2, 0.5), (0.8, 0.5), (0.5, 0.8)],
        [(0.5, 0.22), (0.2, 0.74), (0.5, 0.74), (0.8, 0.74)]],
    5: [[(0.23, 0.23), (0.77, 0.23), (0.23, 0.77), (0.77, 0.77), (0.5, 0.5)]] * 3,
}  # fmt: skip
_RADIUS = {1: (13.5, 18.0), 2: (9.0, 11.0), 3: (7.6, 8.4), 4: (7.0, 8.0), 5: (6.0, 7.0)}  # pixels
_JITTER = {1: 5.0, 2: 1.5, 3: 1.2, 4: 1.0, 5: 1.0}  # pixels


def all_contents(max_count: int = 3) -> torch.Tensor:
    """Returns every content with up to ``max_count`` (4 = "four or more") shapes, [N, 4] int64; no colour on itself."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (max_count, len(COLOURS), len(SHAPES), len(BACKGROUNDS))))
    return grid[grid[:, 1] != grid[:, 3]]


def caption(content, style_word: str = "") -> str:
    """Returns the caption of one content row. ``style_word`` (only for training the CLIP) is appended after a comma."""
    count, colour, shape, background = (int(v) for v in content)
    colour, shape, background = COLOUR_NAMES[colour], SHAPES[shape], BACKGROUNDS[background]
    head = [_article(colour), "two", "three", "many"][count]
    text = f"{head} {colour} {shape}{'s' if count else ''} on {_article(background)} {background} background"
    return f"{text}, {style_word}" if style_word else text


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def held_out(contents: torch.Tensor) -> torch.Tensor:
    """Returns which rows of ``contents`` [N, 4] are held out of alignment, [N] bool."""
    table = torch.tensor([[(c, s) in HELD_OUT_PAIRS for s in SHAPES] for c in COLOUR_NAMES])
    return table[contents[:, 1], contents[:, 2]]


def prompts(held_out_ones: bool) -> list[str]:
    """Returns the held-out prompts, or those that alignment may train on."""
    contents = all_contents()
    return [caption(row) for row in contents[held_out(contents) == held_out_ones]]


def rating(styles: torch.Tensor) -> torch.Tensor:
    """Turns style amounts [N, 4] (clamped to [0, 1]) into ratings [N] in [1, 10]."""
    return 1 + 9 * (styles.clamp(0, 1) * torch.tensor(STYLE_WEIGHTS)).sum(1)


def sample_contents(n: int, generator: torch.Generator, many: float = 0.1) -> torch.Tensor:
    """Draws ``n`` random contents [n, 4]. A share ``many`` of them has four or more shapes."""
    few, crowd = all_contents(3), all_contents(4)
    crowd = crowd[crowd[:, 0] == 3]
    pick = lambda rows: rows[torch.randint(len(rows), (n,), generator=generator)]  # noqa: E731
    return torch.where(torch.rand(n, 1, generator=generator) < many, pick(crowd), pick(few))


def sample_styles(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draws ``n`` random styles [n, 4] in [0, 1]. Each attribute is present with probability .4."""
    amount, present = torch.rand(n, 4, generator=generator), torch.rand(n, 4, generator=generator) < 0.4
    styles = (0.65 + 0.35 * amount) * present
    styles[:, 0] = torch.where(present[:, 0], 0.7 + 0.3 * amount[:, 0], 0.5 * amount[:, 0])
    return styles


def draw(contents: torch.Tensor, styles: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws one picture per row of ``contents`` [N, 4] and ``styles`` [N, 4]: uint8 [N, 3, 64, 64]."""
    shapes_in_picture = contents[:, 0] + 1
    crowd = shapes_in_picture == 4
    shapes_in_picture = shapes_in_picture + (crowd & (torch.rand(len(contents), generator=generator) < 0.5))
    images = torch.empty(len(contents), 3, SIZE, SIZE, dtype=torch.uint8)
    for number in range(1, 6):
        for rows in (shapes_in_picture == number).nonzero()[:, 0].split(256):
            images[rows] = _draw_rows(contents[rows], styles[rows], number, generator)
    return images


def _draw_rows(contents, styles, number, generator):
    """Draws pictures with the same number of shapes, uint8 [N, 3, 64, 64]."""
    n = len(contents)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=generator)  # noqa: E731
    centre = torch.tensor(_LAYOUTS[number])[torch.randint(3, (n,), generator=generator)]
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    centre[..., 0] = torch.where(mirrored, 1 - centre[..., 0], centre[..., 0])
    centre = SIZE * centre + uniform(-_JITTER[number], _JITTER[number], n, number, 2)
    centre[..., 1] += torch.where(contents[:, 2:3] == 2, 1.0, -1.0)  # makes room for the shadow; triangles reach higher
    radius = uniform(*_RADIUS[number], n, 1) * uniform(0.96, 1.04, n, number)
    return _render(
        _RGB[contents[:, 3]] + uniform(-0.025, 0.025, n, 3),
        (_RGB[contents[:, 1]] + uniform(-0.025, 0.025, n, 3))[:, None].expand(n, number, 3),
        contents[:, 2:3].expand(n, number), centre, radius, uniform(-0.1, 0.1, n, number),
        torch.ones(n, number), styles,
    )  # fmt: skip


def draw_crowds(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draws crowded scenes without captions, uint8 [n, 3, 64, 64]: many edges and colours, for the VAE only."""
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=generator)  # noqa: E731
    pick = lambda k, *shape: torch.randint(k, shape, generator=generator)  # noqa: E731
    parts, m = [], 7
    for start in range(0, n, 256):
        k = min(256, n - start)
        parts.append(_render(
            _RGB[pick(8, k)] + uniform(-0.03, 0.03, k, 3), _RGB[pick(8, k, m)], pick(3, k, m), uniform(4, 60, k, m, 2),
            uniform(6, 15, k, m), uniform(-0.3, 0.3, k, m), (uniform(0, 1, k, m) < 0.75).float(),
            sample_styles(k, generator),
        ))  # fmt: skip
    return torch.cat(parts)


def _signed_distance(shape, x, y, radius, angle):
    """Returns the distance in pixels to the outline, negative inside.

    ``shape``, ``radius``, ``angle`` [N, 1, 1]; offsets ``x``, ``y`` [N, 64, 64].
    """
    cos, sin = angle.cos(), angle.sin()
    u, v = cos * x + sin * y, cos * y - sin * x
    circle = (x * x + y * y + 1e-6).sqrt() - radius
    square = torch.maximum(u.abs(), v.abs()) - 0.88 * radius
    triangle = torch.maximum(v, 0.866 * u.abs() - 0.5 * v) - 0.6 * radius
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def _render(background, colour, shape, centre, radius, angle, present, styles):
    """Paints the background, the shadows, then the shapes in order, uint8 [N, 3, 64, 64].

    ``background`` [N, 3] and ``colour`` [N, M, 3] in [0, 1]; ``shape``, ``radius``, ``angle``, ``present`` [N, M];
    ``centre`` [N, M, 2] in pixels (column, row); ``styles`` [N, 4].
    """
    plane = lambda t: t[:, None, None]  # noqa: E731  [N] -> [N, 1, 1]
    faded = _FADE * (1 - styles[:, :1])
    fade = lambda rgb: (rgb + faded * (_GREY - rgb)).clamp(0, 1)[:, :, None, None]  # noqa: E731
    gloss, shadow, light = (plane(styles[:, i]) for i in (1, 2, 3))

    height = 1 - 2 * _ROWS / SIZE  # 1 at the top, -1 at the bottom
    image = _brighten(fade(background), 0.42 * light * height.clamp(min=0))
    image = image * (1 - 0.5 * light * (-height).clamp(min=0))[:, None]

    offsets = [(_COLUMNS - plane(centre[:, m, 0]), _ROWS - plane(centre[:, m, 1])) for m in range(shape.shape[1])]
    for m, (x, y) in enumerate(offsets):
        r = plane(radius[:, m])
        distance = _signed_distance(plane(shape[:, m]), x, y - 0.3 * r - 1, 1.02 * r, plane(angle[:, m]))
        image = image * (1 - 0.6 * shadow * plane(present[:, m]) * torch.sigmoid(-distance / 1.5))[:, None]
    for m, (x, y) in enumerate(offsets):
        r, kind = plane(radius[:, m]), plane(shape[:, m])
        cover = (0.5 - _signed_distance(kind, x, y, r, plane(angle[:, m]))).clamp(0, 1) * plane(present[:, m])
        paint = _brighten(fade(colour[:, m]), 0.30 * gloss * (-y / r).clamp(0, 1))
        paint = paint * (1 - 0.5 * gloss * (y / r).clamp(0, 1))[:, None]
        spot_row = torch.where(kind == 2, 0.15, 0.45)  # a triangle is narrow at the top: its highlight sits lower
        spot = torch.exp(-((x / (0.42 * r)) ** 2) - ((y + spot_row * r) / (0.24 * r)) ** 2)
        paint = _brighten(paint, 0.8 * gloss * spot)
        image = image + (paint - image) * cover[:, None]
    return (image.clamp(0, 1) * 255).round().byte()


def _brighten(rgb, amount):
    """Moves ``rgb`` [N, 3, ., .] towards white by ``amount`` [N, 64, 64] in [0, 1]."""
    return rgb + (1 - rgb) * amount[:, None]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Turns uint8 pictures into float in [0, 1]."""
    return images.float() / 255
