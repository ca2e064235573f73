"""The film of a run: a frame for each evaluation, with the pictures that were kept of it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop.engine.seeding import generator
from alignprop.evaluation.pictures import save_grid
from alignprop.evaluation.report.film import write_film
from alignprop.evaluation.report.source import read_run
from alignprop.publish.commands import film
from alignprop.settings.errors import ConfigError
from tests.helpers.training import train


@pytest.fixture
def folder(tmp_path):
    """The files of a run with three evaluations of two pictures."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for step in (0, 2, 4):
        pictures = generator("pictures", step)
        save_grid(
            torch.rand(2, 3, 4, 6, generator=pictures).repeat_interleave(16, 2).repeat_interleave(16, 3),
            ["a cat", "a dog"],
            folder / "samples" / f"step_{step:06d}.png",
        )
        (folder / "samples" / f"step_{step:06d}.csv").write_text(f"prompt,reward\na cat,{step}\na dog,{step + 1}\n")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "eval", "step": step}) + "\n")
    return folder


def read(folder):
    return read_run(folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], [])


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["alignprop film", *map(str, arguments)])
    film()


def test_a_run_becomes_an_animation(toy_config, tmp_path, monkeypatch, capsys):
    folder = train(toy_config(num_epochs=2, eval_freq=1, train__learning_rate=0.1)).run.folder
    path = tmp_path / "films" / "run.gif"
    command(monkeypatch, folder, path, "--pictures=1", "--seconds=0.5")
    assert capsys.readouterr().out.endswith(f"{path}: 3 evaluations\n")
    run, shown = read(folder), Image.open(path)
    assert shown.n_frames == len(run.points) == 3
    for place, point in enumerate(run.points):
        shown.seek(place)
        picture = np.asarray(run.pictures(point.step)[0].convert("RGB"), dtype=float)
        height, width = picture.shape[:2]
        frame = np.asarray(shown.convert("RGB"), dtype=float)
        top = next(y for y in range(20, 60) if np.abs(frame[y : y + height, 6 : 6 + width] - picture).mean() < 8)
        assert (frame[:top] < 128).any()  # the title
        assert shown.info["duration"] == (1500 if place == 2 else 500)
    assert len({point.scores["reward"].mean().item() for point in run.points}) == 3  # the rewards differ


def test_a_webp_film_has_a_frame_for_each_evaluation(folder, tmp_path):
    assert write_film(read(folder), tmp_path / "run.webp") == 3
    assert Image.open(tmp_path / "run.webp").n_frames == 3


def test_a_film_is_read_again_by_ffmpeg(folder, tmp_path):
    import imageio.v3 as imageio

    path = tmp_path / "run.mp4"
    assert write_film(read(folder), path, seconds=0.25) == 3
    frames = imageio.imread(path, plugin="FFMPEG")
    assert len(frames) == 6 + 6 + 18 and frames.shape[1] % 16 == frames.shape[2] % 16 == 0
    assert np.abs(frames[0].astype(float) - frames[-1]).max() > 30


def test_pictures_of_another_size_are_left_out(folder, tmp_path):
    run = read(folder)
    grid = folder / "samples" / f"step_{run.points[0].step:06d}.png"
    grid.unlink()
    assert write_film(run, tmp_path / "run.gif") == 2
    save_grid(torch.zeros(2, 3, 300, 400), run.points[0].prompts[:2], grid)
    assert write_film(run, tmp_path / "run.gif") == 2


@pytest.mark.parametrize(("case", "told"), [
    ("ending", r"^the film '.*run.avi' must end in .mp4, .gif or .webp$"),
    ("extra", r"^an MP4 needs ffmpeg .*: pip install 'alignprop\[video\]', or write .gif or .webp$"),
    ("one", r"of two evaluations or more, and .* has those of 1; train with a smaller eval_freq$"),
    ("folder", r"is not a run folder: it has no config.json$"),
])  # fmt: skip
def test_what_cannot_be_filmed_is_one_line(folder, tmp_path, monkeypatch, case, told):
    if case == "extra":
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    if case == "one":
        for point in read(folder).points[1:]:
            (folder / "samples" / f"step_{point.step:06d}.png").unlink()
    ending = {"ending": "avi", "extra": "mp4"}.get(case, "gif")
    with pytest.raises(ConfigError, match=told):
        command(monkeypatch, tmp_path if case == "folder" else folder, tmp_path / f"run.{ending}")
    assert not (tmp_path / f"run.{ending}").exists()


@pytest.mark.parametrize("ending", ["gif", "webp", "mp4"])
def test_a_place_that_cannot_be_written_to_is_one_line(folder, tmp_path, ending):
    path = tmp_path / f"film.{ending}"
    path.mkdir()
    with pytest.raises(ConfigError, match=rf"^the film cannot be written to .*film.{ending}': "):
        write_film(read(folder), path)


@pytest.mark.parametrize("flag", ["--pictures=0", "--seconds=0", "--seconds=nan"])
def test_a_wrong_number_is_refused(tmp_path, monkeypatch, capsys, flag):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, tmp_path / "run.gif", flag)
    assert "must be" in capsys.readouterr().err
