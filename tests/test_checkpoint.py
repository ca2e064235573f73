import os
import random

import numpy as np
import pytest
import torch

from alignprop.checkpoint import (
    STATE_FILE,
    checkpoints_of,
    find_checkpoint,
    random_state,
    read_state,
    restore_random_state,
    run_folder_of,
    write_checkpoint,
)
from alignprop.settings import ConfigError


def write(run, step, limit=0):
    return write_checkpoint(run, step, {"global_step": step}, lambda folder: (folder / "weights").touch(), limit)


def test_written_whole_and_read_back(tmp_path):
    checkpoint = write(tmp_path, 3)
    assert read_state(checkpoint) == {"global_step": 3}
    assert sorted(p.name for p in checkpoint.iterdir()) == [STATE_FILE, "weights"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_3"]


def test_a_failed_write_leaves_no_checkpoint(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 1, {}, fail, 0)
    assert checkpoints_of(tmp_path) == []


def test_order_is_by_number_and_the_oldest_go(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step, limit=2)
    assert [p.name for p in checkpoints_of(tmp_path)] == ["checkpoint_10", "checkpoint_11"]


def test_find(tmp_path):
    older, newer = tmp_path / "zebra", tmp_path / "ape"
    first, second = write(older, 2), write(older, 10)
    latest = write(newer, 1)
    os.utime(second, (1, 1))
    assert find_checkpoint(str(first), "") == first
    assert find_checkpoint(str(older), "") == second
    assert find_checkpoint("latest", str(tmp_path)) == latest
    assert run_folder_of(latest) == newer
    assert run_folder_of(tmp_path) is None


@pytest.mark.parametrize(("resume_from", "message"), [
    ("latest", "no run in log_dir"), ("nowhere", "does not exist"), (".", "holds no checkpoint"),
])  # fmt: skip
def test_nothing_to_find(tmp_path, monkeypatch, resume_from, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"resume_from = '{resume_from}'.*{message}"):
        find_checkpoint(resume_from, str(tmp_path))


def test_a_pickle_is_never_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"global_step": Payload()}, tmp_path / STATE_FILE)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_state(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_random_states_survive_saving(tmp_path):
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))  # noqa: E731
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected
