import contextlib
import json
import math
import sqlite3
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from alignprop.runs.tracking import MetricsLog, log_images, log_row, parse_log_with, start_trackers, wandb_mode
from alignprop.settings.errors import ConfigError
from tests.helpers import warm


def row(step, **values):
    return {"kind": "train", "step": step, **values}


# ---- metrics.jsonl


def test_rows_come_back_in_order_and_are_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    assert log.rows() == [] and not (tmp_path / "run").exists()
    rows = [row(0, reward=5.25, adjoint_norm=[None, 0.5]), row(1, rewards={"clip": 0.3}, note="é")]
    for n, entry in enumerate(rows):
        log.append(entry)
        assert MetricsLog(log.path).rows() == rows[: n + 1]
    assert [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()] == rows


def test_non_finite_numbers_become_null_at_any_depth(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row(0, loss=math.nan, norms=(1.0, math.inf), rewards={"clip": -math.inf}, big=10**400))
    assert log.rows() == [row(0, loss=None, norms=[1.0, None], rewards={"clip": None}, big=10**400)]


def test_a_tensor_is_refused_and_leaves_the_file_alone(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row(0))
    with pytest.raises(TypeError, match="Tensor"):
        log.append(row(1, reward=torch.tensor(1.0)))
    assert log.rows() == [row(0)]


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    rows = [{"kind": "eval", "step": 0}, row(1), row(2), {"kind": "eval", "step": 2}, row(3), row(4)]
    for entry in rows:
        log.append(entry)
    with log.path.open("a") as file:
        file.write('{"kind": "train", "st')  # the run was killed here
    assert log.rows() == rows
    log.truncate_after(2)
    assert log.rows() == rows[:4]
    log.append(row(3, again=True))
    assert log.rows() == [*rows[:4], row(3, again=True)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_nothing_keeps_the_bytes(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row(0, reward=0.1 + 0.2, note="é"))
    before = log.path.read_bytes()
    log.truncate_after(0)
    assert log.path.read_bytes() == before


def test_truncation_is_atomic(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row(5))
    monkeypatch.setattr("alignprop.runs.tracking.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        log.truncate_after(0)
    assert log.rows() == [row(5)]


def test_a_broken_line_that_is_not_the_last_is_named(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(row(0))
    with log.path.open("a") as file:
        file.write("{broken\n")
    log.append(row(1))
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        log.rows()


# ---- trackers


def test_log_with_is_a_list_of_names_or_none():
    assert parse_log_with("") is None
    assert parse_log_with(" wandb,tensorboard, wandb") == ["wandb", "tensorboard"]


def test_an_unknown_tracker_is_one_plain_line():
    with pytest.raises(ConfigError, match=r"log_with = 'tensorbord'.*wandb, tensorboard") as caught:
        parse_log_with("tensorbord")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("alignprop.runs.tracking.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        parse_log_with("tensorboard")


@pytest.fixture
def accelerator(tmp_path, monkeypatch):
    """An accelerator with both trackers started, wandb offline, everything written under `tmp_path`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    accelerator = Accelerator(cpu=True, log_with=parse_log_with("wandb,tensorboard"), project_dir=tmp_path)
    config = {"seed": 0, "train": {"learning_rate": 1e-3, "betas": (0.9, 0.999)}, "resume_from": None}
    start_trackers(accelerator, "alignprop", "test", tmp_path, config)
    yield accelerator
    accelerator.end_training()


def test_numbers_and_pictures_reach_both_trackers_offline(accelerator, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pictures = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    log_row(accelerator, row(3, epoch=0, reward=5.5, loss=math.nan, adjoint_norm=[1.0], rewards={"clip": 0.25}))
    log_images(accelerator, "samples", pictures, ["a cat", "a dog"], step=3)
    log_row(accelerator, row(4, epoch=1))  # wandb sums a step up when the next one begins
    run = accelerator.get_tracker("wandb").tracker
    assert run.settings.mode == "offline" and run.settings.run_name == "test"
    assert run.config["train/learning_rate"] == 1e-3
    assert run.summary["train/reward"] == 5.5 and run.summary["train/rewards/clip"] == 0.25
    assert not {"train/loss", "train/adjoint_norm", "train/step"} & set(run.summary.keys())
    accelerator.end_training()

    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents*") if path.parent.name == "alignprop")
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(3, 5.5)]
    assert [(event.step, event.value) for event in events.Scalars("train/rewards/clip")] == [(3, 0.25)]
    assert not {"train/loss", "train/adjoint_norm", "train/step"} & set(events.Tags()["scalars"])
    picture = events.Images("samples")[0]
    assert picture.step == 3 and picture.width > 2 * 128 and picture.height > 128
    sent = list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_3_*.png"))
    assert len(sent) == 1
    with Image.open(sent[0]) as file:
        assert file.size == (picture.width, picture.height)
        assert (np.asarray(file.convert("RGB")) == (255, 0, 0)).all(-1).sum() == 2 * 128 * 128


WITH_TRACKIO = """
import sys, torch
from accelerate import Accelerator
from alignprop.runs.tracking import log_images, log_row, parse_log_with, start_trackers
for step in (3, 4):  # the second time it is resumed
    accelerator = Accelerator(cpu=True, log_with=parse_log_with("trackio"), project_dir=sys.argv[1])
    start_trackers(accelerator, "alignprop", "test", sys.argv[1], {"seed": 0, "train": {"betas": (0.9, 0.999)}})
    log_row(accelerator, {"kind": "train", "step": step, "reward": 5.5, "rewards": {"clip": 0.25}})
    log_images(accelerator, "samples", torch.rand(2, 3, 8, 8), ["a cat", "a dog"], step=step)
    accelerator.end_training()
"""


def test_numbers_and_pictures_reach_trackio(tmp_path):
    """In a process of its own, because trackio reads its folder from the environment when it is imported."""
    done = warm.call("-c", WITH_TRACKIO, tmp_path, environment={"TRACKIO_DIR": tmp_path / "trackio"})
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "alignprop.db")) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    numbers = [(name, step, json.loads(text)) for name, step, text in rows if b"train/reward" in text]
    assert numbers == [(rows[0][0], step, {"train/reward": 5.5, "train/rewards/clip": 0.25}) for step in (3, 4)]
    assert rows[0][0].startswith("test-")  # and something of the folder
    for step in (3, 4):
        (picture,) = (tmp_path / "trackio" / "media").rglob(f"{step}/*.png")
        with Image.open(picture) as file:
            assert file.width > 2 * 128


def test_a_run_without_trackers_logs_to_none(tmp_path):
    accelerator = Accelerator(cpu=True, log_with=parse_log_with(""), project_dir=tmp_path)
    start_trackers(accelerator, "alignprop", "test", tmp_path, {"seed": 0})
    log_row(accelerator, row(0, reward=1.0))
    log_images(accelerator, "samples", torch.zeros(1, 3, 8, 8), [""], step=0)
    assert accelerator.trackers == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("reason", ["nobody", "network", "key"])
def test_wandb_falls_back_to_offline_with_one_warning(monkeypatch, capsys, reason):
    import wandb

    def login(prompt, verify):
        assert verify and not prompt
        if reason == "network":
            raise wandb.errors.AuthenticationError("cannot reach the server\nTraceback ...")
        if reason == "key":
            raise ValueError("API key must be longer")
        return False

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", login)
    assert wandb_mode() == "offline"
    (line,) = capsys.readouterr().err.splitlines()
    why = {"nobody": "nobody is logged in", "network": "cannot reach the server", "key": "API key must be longer"}
    assert line.startswith(f"warning: wandb runs offline: {why[reason]}")


def test_wandb_is_online_where_it_is_logged_in_and_where_the_user_says_so(monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    assert wandb_mode() == "online"
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
    assert not capsys.readouterr().err


def test_without_trackers_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would now fail
    accelerator = Accelerator(cpu=True, log_with=None, project_dir=tmp_path)
    start_trackers(accelerator, "alignprop", "test", tmp_path, {})
    with pytest.raises(ImportError):
        wandb_mode()


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    started = []

    class Accelerator:
        log_with, is_main_process = ("wandb",), True

        def init_trackers(self, project, config, init_kwargs):
            started.append(init_kwargs["wandb"])

    for folder in ("a", "a", "b"):
        start_trackers(Accelerator(), "alignprop", folder, tmp_path / folder, {})
    first, again, other = started
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow"
