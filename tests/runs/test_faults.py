"""What tests/helpers/faults.py compares; the kills themselves take minutes and are its own to make."""

import random
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers.faults import contents, disturb, flat
from tests.helpers.training import train


def test_every_leaf_has_a_name():
    nested = {"a": [torch.ones(2), {"b": 1}], "c": "x"}
    assert flat(nested, "s") == {"s/a/0": torch.ones(2).numpy().tobytes(), "s/a/1/b": 1, "s/c": "x"}


def test_two_equal_runs_are_equal_and_any_change_shows(toy_config):
    options = dict(num_epochs=1, eval_freq=1, eval_base_distance=True)
    ours, theirs = (train(toy_config(run_name=name, **options)).run.folder for name in "ab")
    expected = contents(theirs)
    assert contents(ours) == expected
    assert any("optimizer" in name for name in expected) and any("metrics.jsonl" in name for name in expected)
    changes = {
        "metrics.jsonl": lambda p: p.write_text(p.read_text().replace('"kind": "train"', '"kind": "trial"', 1)),
        "samples/step_000002.png": lambda p: p.write_bytes(p.read_bytes()[:-1]),
        "checkpoints/checkpoint_2/pytorch_lora_weights.safetensors": lambda p: p.unlink(),
    }
    for name, change in changes.items():
        before = (ours / name).read_bytes()
        change(ours / name)
        found = contents(ours)
        assert [key for key in found | expected if found.get(key) != expected.get(key)], name
        (ours / name).write_bytes(before)
    (ours / "checkpoints" / "checkpoint_1").mkdir()
    (ours / "checkpoints" / "checkpoint_1" / "file").touch()
    assert contents(ours) != expected


@pytest.mark.parametrize(("way", "code"), [
    ("killed while saving", -signal.SIGKILL), ("killed at any moment", -signal.SIGKILL),
    ("asked to stop", -signal.SIGTERM),
])  # fmt: skip
def test_a_process_is_ended_in_the_way_that_was_drawn(tmp_path, way, code):
    (tmp_path / "checkpoints" / "writing_1").mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    rng = random.Random(0)
    rng.randint = lambda low, high: 0  # the first save
    disturb(process, tmp_path, way, 0.1, rng)
    assert process.returncode == code
