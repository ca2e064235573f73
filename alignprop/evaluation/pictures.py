"""Draws labelled grids of pictures (PNG), and the curves of a run or of a weight soup (matplotlib)."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

CONTENTS = "contents"  # A grid's PNG lists its pictures under this key: JSON [[label, [left, top, right, bottom]], …].


Pictures = torch.Tensor | list[torch.Tensor]
"""Pictures in [0, 1]: float [B, 3, H, W], or a list of B pictures [3, H, W] if their sizes differ."""


def to_pil(image: torch.Tensor) -> Image.Image:
    """Returns a float tensor [3, H, W] in [0, 1] as an 8-bit picture; NaN becomes black."""
    pixels = image.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_image(image: torch.Tensor, path: str | os.PathLike) -> None:
    """Writes one picture, a float tensor [3, H, W] in [0, 1], as a PNG."""
    _save_png(to_pil(image), path)


def save_grid(images: Pictures, labels: Sequence[str], path: str | os.PathLike, columns: int | None = None) -> None:
    """Writes B pictures as one PNG, with ``labels`` under them; see `draw_grid`."""
    _save_png(draw_grid(images, labels, columns), path)


def read_grid(path: str | os.PathLike) -> list[tuple[str, Image.Image]]:
    """Returns the (label, picture) pairs in a PNG of `save_grid`, in the size drawn; none from any other PNG."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a grid of large pictures is our own file
    try:
        with Image.open(path) as grid:
            return [(label, grid.crop(box)) for label, box in json.loads(grid.info.get(CONTENTS, "[]"))]
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def save_before_after(before: Pictures, after: Pictures, labels: Sequence[str], path: str | os.PathLike) -> None:
    """Writes two rows of B pictures, ``before`` above ``after``, with one label per column."""
    texts = [""] * len(before) + list(labels)
    _save_png(draw_grid([*before, *after], texts, len(before), row_titles=("before", "after")), path)


def save_comparison(rows: Mapping[str, Pictures], labels: Sequence[str], path: str | os.PathLike) -> None:
    """Writes a row of pictures for each name, 8 at most, with the prompts of the labels under the last row.

    Args:
        rows: the B pictures of each name.
        labels: the captions of the pictures, as `Evaluation.labels` returns them.
        path: the PNG to write.
    """
    count = min(8, *map(len, rows.values()))
    texts = [""] * count * (len(rows) - 1) + [label.rpartition("\n")[0] for label in labels[:count]]
    pictures = [image for images in rows.values() for image in images[:count]]
    _save_png(draw_grid(pictures, texts, count, row_titles=tuple(rows)), path)


def draw_grid(
    images: Pictures,
    labels: Sequence[str],
    columns: int | None = None,
    row_titles: Sequence[str] = (),
    min_side: int = 128,
    max_lines: int = 4,
) -> Image.Image:
    """Draws pictures in a grid on a white background. Each cell has room for the largest width and height.

    Args:
        images: the B pictures.
        labels: B texts, wrapped to the width of a picture.
        columns: the number of pictures per row; by default 8 at most.
        row_titles: the titles on the left of the rows.
        min_side: smaller pictures are enlarged by a whole factor, so that the text under them can be read.
        max_lines: the number of wrapped lines that each line of a label may take.

    Raises:
        ValueError: a picture has another shape, there are none, or the number of labels differs.
    """
    shapes = [tuple(image.shape) for image in images]
    if not shapes or any(len(shape) != 3 for shape in shapes) or len(labels) != len(images):
        raise ValueError(f"a grid of pictures {shapes} got {len(labels)} labels")
    columns = min(columns or 8, len(images))
    zoom = max(1, math.ceil(min_side / min(min(shape[1:]) for shape in shapes)))
    height, width = (zoom * max(shape[axis] for shape in shapes) for axis in (1, 2))
    font = label_font(max(12, width // 24))
    line_height = sum(font.getmetrics()) + 1
    gap = 6

    texts = [_wrap(label, font, width, max_lines) for label in labels]
    rows = [range(first, min(first + columns, len(images))) for first in range(0, len(images), columns)]
    text_heights = [max(len(texts[j]) for j in row) * line_height for row in rows]
    margin = math.ceil(max((font.getlength(title) + gap for title in row_titles), default=0))
    total_height = gap + sum(height + text_height + 2 * gap for text_height in text_heights)
    canvas = Image.new("RGB", (margin + gap + columns * (width + gap), total_height), "white")
    draw = ImageDraw.Draw(canvas)
    top, contents = gap, []
    for r, row in enumerate(rows):
        if r < len(row_titles):
            draw.text((gap, top + (height - line_height) // 2), row_titles[r], "black", font)
        for column, j in enumerate(row):
            left = margin + gap + column * (width + gap)
            own = shapes[j][2] * zoom, shapes[j][1] * zoom
            canvas.paste(to_pil(images[j]).resize(own, Image.Resampling.BICUBIC), (left, top))
            contents.append([labels[j], [left, top, left + own[0], top + own[1]]])
            for n, line in enumerate(texts[j]):
                draw.text((left, top + height + gap // 2 + n * line_height), line, "black", font)
        top += height + text_heights[r] + 2 * gap
    canvas.info[CONTENTS] = json.dumps(contents)
    return canvas


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font of all texts in pictures."""
    # The font comes with matplotlib, because Pillow's own has neither arrows nor Greek and Cyrillic letters.
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _wrap(text: str, font, width: int, max_lines: int) -> list[str]:
    """Breaks ``text`` into lines of at most ``width`` pixels; cuts a word that is too long."""
    lines = []
    for paragraph in text.split("\n") if text else []:
        wrapped = [""]
        for word in paragraph.split():
            joined = f"{wrapped[-1]} {word}".strip()
            if font.getlength(joined) <= width:
                wrapped[-1] = joined
            else:
                wrapped += [word] if wrapped[-1] else []
                wrapped[-1] = _shorten(word, font, width)
        if len(wrapped) > max_lines:
            wrapped = [*wrapped[: max_lines - 1], _shorten(wrapped[max_lines - 1] + " …", font, width)]
        lines += wrapped
    return lines


def _shorten(text: str, font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _save_png(picture: Image.Image, path: str | os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    texts = PngInfo()
    if CONTENTS in picture.info:
        texts.add_text(CONTENTS, picture.info[CONTENTS])
    picture.save(path, format="PNG", pnginfo=texts)


def plot_curves(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Draws a run's metrics rows: training reward, held-out rewards and measures, gradient norm, latest adjoint norms.

    A quantity that no row has gets no panel. Without any panel, no file is written.
    """
    train = [row for row in rows if row.get("kind") == "train"]
    held_out = [row for row in rows if row.get("kind") == "eval"]
    names = list(dict.fromkeys(name for row in held_out for name in row.get("rewards") or {}))
    adjoint = next((row for row in reversed(train) if row.get("adjoint_norm")), None)

    curves = []
    for title, kind in (("training reward", train), ("held-out reward", held_out)):
        by_size = [{"step": row["step"], **row["reward_by_size"]} for row in kind if "reward_by_size" in row]
        sizes = sorted({size for row in by_size for size in row} - {"step"})
        if kind is held_out or not sizes:  # a training step has only one of the sizes
            curves.append((title, "optimizer step", *_series(kind, "reward")))
        curves += [(f"{title}, {size}", "optimizer step", *_series(by_size, size)) for size in sizes]
    if len(names) > 1:  # A single one is the reward itself, which already has a panel.
        parts = [{"step": row["step"], **(row.get("rewards") or {})} for row in held_out]
        curves += [(f"held-out {name}", "optimizer step", *_series(parts, name)) for name in names]
    for name in ("diversity", "base_distance"):
        curves += [(f"held-out {name.replace('_', ' ')}", "optimizer step", *_series(held_out, name))]
    curves += [("gradient norm", "optimizer step", *_series(train, "grad_norm"))]
    if adjoint is not None:
        norms = [math.nan if value is None else value for value in adjoint["adjoint_norm"]]
        curves += [(f"adjoint norm at step {adjoint['step']}", "sampler step", range(len(norms)), norms)]
    curves = [curve for curve in curves if any(math.isfinite(y) for y in curve[3])]
    if not curves:
        return

    figure, axes = _panels(len(curves))
    for axis, (title, xlabel, x, y) in zip(axes, curves, strict=True):
        axis.plot(x, y, marker="o" if len(x) <= 60 else None, markersize=3)
        axis.set(title=title, xlabel=xlabel)
        if "norm" in title and all(value > 0 for value in y if math.isfinite(value)):
            axis.set_yscale("log")
    _save_figure(figure, path)


def plot_soup(
    coefficients: Sequence[float],
    results: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike,
) -> None:
    """Draws each reward over the mixing coefficient, in a panel of its own.

    Args:
        coefficients: the C mixing coefficients of the first checkpoint, in any order.
        results: C pairs (mean, standard error) for each named reward, in the same order.
        path: the PNG to write.
    """
    order = sorted(range(len(coefficients)), key=lambda i: coefficients[i])
    figure, axes = _panels(len(results))
    for axis, (name, pairs) in zip(axes, results.items(), strict=True):
        means, errors = zip(*(pairs[i] for i in order), strict=True)
        axis.errorbar([coefficients[i] for i in order], means, yerr=errors, marker="o", capsize=2)
        axis.set(title=name, xlabel="mixing coefficient of the first checkpoint")
    _save_figure(figure, path)


def plot_bars(results: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | os.PathLike) -> None:
    """Draws {variant: {measure: {"mean", "stderr"}}}, with a panel for each measure and a bar for each variant."""
    measures = list(next(iter(results.values())))
    figure, axes = _panels(len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        means, errors = ([measures[measure][key] for measures in results.values()] for key in ("mean", "stderr"))
        axis.bar(list(results), means, yerr=errors, capsize=3)
        axis.set(title=measure)
        axis.tick_params(axis="x", labelrotation=20)
    _save_figure(figure, path)


def _series(rows: Sequence[dict], key: str) -> tuple[list, list]:
    """Returns the steps and the values of the rows that have ``key``; a null value becomes a gap in the line."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def _panels(count: int):
    # Figure is used instead of pyplot: it has no global state, and draws with Agg whatever the user's backend is.
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    grid = math.ceil(count / columns), columns
    figure = Figure(figsize=(4.2 * grid[1], 3.2 * grid[0]), layout="constrained")
    axes = figure.subplots(*grid, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
    return figure, axes[:count]


def _save_figure(figure, path: str | os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
