import os

import pytest
import torch

from alignprop.runs.checkpoint import (
    checkpoints_of,
    clean_up,
    find_checkpoint,
    prune,
    read_state,
    run_folder_of,
    write_checkpoint,
)
from alignprop.runs.manifest import MANIFEST, STATE_FILE
from alignprop.settings.errors import ConfigError

BASE = {"name": "base", "weights": [1.0]}


def write(run, step, for_a_stop=False):
    touch = lambda folder: (folder / "weights").touch()  # noqa: E731
    return write_checkpoint(run, step, {"global_step": step}, touch, BASE, for_a_stop)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def damage(checkpoint):
    path = checkpoint / STATE_FILE
    path.write_bytes(path.read_bytes()[:-1])


def test_written_whole_and_read_back(tmp_path):
    checkpoint = write(tmp_path, 3)
    assert read_state(checkpoint) == {"global_step": 3}
    assert sorted(p.name for p in checkpoint.iterdir()) == [MANIFEST, STATE_FILE, "weights"]
    assert names(tmp_path) == ["checkpoint_3"]


def test_everything_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    flushed, fsync, rename = [], os.fsync, os.rename
    path_of = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(path_of(descriptor)), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", lambda a, b, **k: (flushed.append("renamed"), rename(a, b, **k))[1])
    write(tmp_path, 1)
    before = {name.rpartition("/")[2] for name in flushed[: flushed.index("renamed")]}
    assert before == {MANIFEST, STATE_FILE, "weights", "writing_1"}
    assert flushed[flushed.index("renamed") + 1 :] == [str(tmp_path / "checkpoints")]


def test_a_failed_write_leaves_no_checkpoint_and_the_earlier_ones(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"step 1 could not be written to .*No space left.* there is no earlier one$"):
        write_checkpoint(tmp_path, 1, {}, fail, BASE)
    write(tmp_path, 1)
    message = r"step 2 could not be written to .* MiB are free: .*No space left.* earlier ones are untouched; go on"
    with pytest.raises(ConfigError, match=message):
        write_checkpoint(tmp_path, 2, {}, fail, BASE)
    assert names(tmp_path) == ["checkpoint_1"]


def test_order_is_by_number_and_the_oldest_go(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step)
    prune(tmp_path, limit=0, keep=[], held_out={})
    assert len(checkpoints_of(tmp_path)) == 4
    prune(tmp_path, limit=2, keep=[], held_out={})
    assert names(tmp_path) == ["checkpoint_10", "checkpoint_11"]


def test_the_best_and_the_one_resumed_from_stay(tmp_path):
    paths = {step: write(tmp_path, step) for step in range(1, 7)}
    prune(tmp_path, limit=1, keep=[paths[1]], held_out={2: 0.5, 3: 0.7, 5: 0.6, 9: 1.0})
    assert names(tmp_path) == ["best", "checkpoint_1", "checkpoint_3", "checkpoint_6"]
    assert (tmp_path / "checkpoints" / "best").resolve() == paths[3].resolve()
    assert find_checkpoint(str(tmp_path / "checkpoints" / "best"), "") == paths[3].resolve()
    prune(tmp_path, limit=1, keep=[], held_out={3: 0.7, 6: 0.8})
    assert names(tmp_path) == ["best", "checkpoint_6"]


def test_a_checkpoint_that_was_made_for_a_stop_displaces_no_other(tmp_path):
    for step in (2, 4, 5, 6, 8, 9):
        write(tmp_path, step, for_a_stop=step in (5, 9))
    prune(tmp_path, limit=3, keep=[], held_out={})
    assert names(tmp_path) == ["checkpoint_4", "checkpoint_6", "checkpoint_8", "checkpoint_9"]
    write(tmp_path, 10)
    prune(tmp_path, limit=3, keep=[], held_out={})
    assert names(tmp_path) == ["checkpoint_10", "checkpoint_6", "checkpoint_8"]
    write(tmp_path, 11, for_a_stop=True)
    write(tmp_path, 12)
    prune(tmp_path, limit=0, keep=[], held_out={11: 1.0})
    steps = [f"checkpoint_{step}" for step in (10, 11, 12, 6, 8)]
    assert names(tmp_path) == ["best", *steps]  # 11 is the best
    prune(tmp_path, limit=0, keep=[], held_out={12: 1.0})
    assert "checkpoint_11" not in names(tmp_path)


def test_cleaning_up_after_any_interruption(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    prune(tmp_path, 0, [], {6: 1.0})
    for name in ("writing_8", "deleting_1"):
        (tmp_path / "checkpoints" / name).mkdir()
    clean_up(tmp_path, 4)
    assert names(tmp_path) == ["abandoned_6", "checkpoint_2", "checkpoint_4"]


def test_interrupted_cleaning_up_leaves_an_earlier_run(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        write(tmp_path, step)
    rename = os.rename

    def interrupted(a, b, **options):
        if str(a).endswith("checkpoint_4"):
            raise KeyboardInterrupt
        rename(a, b, **options)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clean_up(tmp_path, 2)
    assert names(tmp_path) == ["abandoned_6", "checkpoint_2", "checkpoint_4"]


def test_file_systems_without_links_or_flushed_folders_serve_too(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path, 1)
    prune(tmp_path, 1, [], {1: 0.5})
    assert names(tmp_path) == ["checkpoint_1"]


def test_find(tmp_path):
    older, newer = tmp_path / "zebra", tmp_path / "ape"
    first, second = write(older, 2), write(older, 10)
    latest = write(newer, 1)
    os.utime(second, (1, 1))
    assert find_checkpoint(str(first), "") == first
    assert find_checkpoint(str(older), "") == second
    assert find_checkpoint("latest", str(tmp_path)) == latest
    assert find_checkpoint("latest", str(tmp_path), run_name="zebra") == second
    assert find_checkpoint("latest", str(tmp_path), run_name="new") is None
    assert run_folder_of(latest) == newer
    assert run_folder_of(tmp_path) is None


def test_a_folder_that_is_called_checkpoints_is_not_yet_a_run_s(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert run_folder_of(tmp_path / "checkpoints" / "mine.safetensors") is None


def test_a_damaged_checkpoint_is_named_and_the_previous_one_offered(tmp_path):
    run = tmp_path / "run"
    first, second, third = (write(run, step) for step in (2, 4, 6))
    damage(third)
    for given in (third, run):
        with pytest.raises(ConfigError) as caught:
            find_checkpoint(str(given), "")
        assert f"{str(third)!r} is damaged ({STATE_FILE} has " in str(caught.value)
        assert f"newest whole one is {str(second)!r}" in str(caught.value)
    assert find_checkpoint(str(first), "") == first


def test_latest_passes_over_damaged_ones_and_says_so(tmp_path, capsys):
    first, second = write(tmp_path / "run", 2), write(tmp_path / "run", 4)
    damage(second)
    for run_name in ("", "run"):
        assert find_checkpoint("latest", str(tmp_path), run_name=run_name) == first
        assert f"skips {str(second)!r}, which is damaged" in capsys.readouterr().err
    damage(first)
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        find_checkpoint("latest", str(tmp_path), run_name="run")


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
