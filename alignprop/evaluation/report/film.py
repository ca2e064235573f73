"""Writes a film of a run: pictures of the same prompts and noise at every evaluation, from the base model on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from alignprop.evaluation.pictures import draw_grid, label_font
from alignprop.evaluation.report.source import RunData
from alignprop.settings.errors import ConfigError

ANIMATIONS = (".gif", ".webp")  # written by Pillow
FRAME_RATE = 24  # frames per second of an MP4; players refuse very low rates
MARGIN = 6  # pixels around the title
LARGEST = 1920  # pixels of a frame's longer side; players refuse very large ones
BLOCK = 16  # MP4 needs a width and a height that are multiples of this


def write_film(run: RunData, path: Path, pictures: int = 8, seconds: float = 0.6) -> int:
    """Writes the film of a run.

    Args:
        run: the run.
        path: the file to write, which must end in .mp4, .gif or .webp. MP4 needs the extra `video`.
        pictures: the largest number of pictures in a frame.
        seconds: how long each evaluation is shown. The last one is shown three times as long.

    Returns:
        The number of evaluations in the film.

    Raises:
        ConfigError: the file's ending is unknown, the extra is missing, the run has fewer than two evaluations whose
            pictures were kept, or the file cannot be written.
    """
    if path.suffix.lower() not in (".mp4", *ANIMATIONS):
        raise ConfigError(f"the film {str(path)!r} must end in .mp4, {' or '.join(ANIMATIONS)}")
    if path.suffix.lower() == ".mp4":
        _find_encoder()
    frames = draw_frames(run, pictures)
    if len(frames) < 2:
        raise ConfigError(
            f"a film needs the pictures of two evaluations or more, and {str(run.folder)!r} has those of "
            f"{len(frames)}; train with a smaller eval_freq"
        )
    write = _write_animation if path.suffix.lower() in ANIMATIONS else _write_mp4
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(frames, path, [seconds] * (len(frames) - 1) + [3 * seconds])
    except OSError as error:
        raise ConfigError(f"the film cannot be written to {str(path)!r}: {error}") from None
    return len(frames)


def draw_frames(run: RunData, pictures: int) -> list[Image.Image]:
    """Draws a frame for each evaluation whose pictures were kept, with its step and its reward above the pictures.

    Args:
        run: the run.
        pictures: the largest number of pictures in a frame.
    """
    frames = []
    for point in run.points:
        shown = [_pixels(picture) for picture in run.pictures(point.step)[:pictures]]
        if shown:
            title = f"step {point.step}, reward {point.scores['reward'].mean():.4g}"
            grid = draw_grid(shown, point.prompts[: len(shown)])
            grid.thumbnail((LARGEST, LARGEST))
            frames.append(_titled(grid, title))
    return [frame for frame in frames if frame.size == frames[-1].size]  # a run may continue with another resolution


def _pixels(picture: Image.Image) -> torch.Tensor:
    """Returns a picture as float [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def _titled(picture: Image.Image, title: str) -> Image.Image:
    """Returns a picture with a line of text above it."""
    font = label_font(max(8, min(20, picture.width // 14)))  # a long title fits beside a single small picture
    height = sum(font.getmetrics()) + MARGIN
    canvas = Image.new("RGB", (picture.width, picture.height + height), "white")
    canvas.paste(picture, (0, height))
    ImageDraw.Draw(canvas).text((MARGIN, MARGIN), title, "black", font)
    return canvas


def _find_encoder() -> None:
    try:
        import imageio.v3  # noqa: F401
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"an MP4 needs ffmpeg ({error}): pip install 'alignprop[video]', or write {' or '.join(ANIMATIONS)}"
        ) from None


def _write_animation(frames: list[Image.Image], path: Path, durations: list[float]) -> None:
    milliseconds = [round(1000 * duration) for duration in durations]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _write_mp4(frames: list[Image.Image], path: Path, durations: list[float]) -> None:
    import imageio.v3 as imageio

    def repeated() -> Iterator[np.ndarray]:
        for frame, duration in zip(frames, durations, strict=True):
            yield from [np.asarray(_padded(frame))] * max(1, round(duration * FRAME_RATE))

    imageio.imwrite(
        path, repeated(), is_batch=True, plugin="FFMPEG", fps=FRAME_RATE, codec="libx264", macro_block_size=BLOCK
    )


def _padded(frame: Image.Image) -> Image.Image:
    """Returns a frame with white on its right and below, so that its sides are multiples of BLOCK."""
    width, height = (-(-side // BLOCK) * BLOCK for side in frame.size)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(frame)
    return canvas
