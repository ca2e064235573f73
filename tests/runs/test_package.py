"""The wheel: what an installed copy needs is in it, and it trains without the repository."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[2]

TRAINING = """
import sys
from pathlib import Path
import alignprop
from alignprop import AlignPropTrainer, get_config

c = get_config("quickstart")
with c.unlocked():
    c.update_from_flattened_dict({
        "log_dir": "logs", "run_name": "run", "num_epochs": 1, "num_inference_steps": 2, "num_eval_images": 2,
        "per_gpu_capacity": 2, "train.total_batch_size": 2, "train.total_samples_per_epoch": 2,
    })
AlignPropTrainer(c).train()
print(Path(alignprop.__file__).parents[1], Path(c.pretrained.model).parents[3], sep="\\n")
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """What the wheel holds, in a folder."""
    source, wheels, folder = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("alignprop", "rewards", "config", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_it_has_every_file_of_the_packages(unpacked):
    tracked = [path for name in ("alignprop", "rewards", "config") for path in (ROOT / name).rglob("*")]
    files = [path.relative_to(ROOT) for path in tracked if path.is_file() and "__pycache__" not in path.parts]
    assert [str(file) for file in files if not (unpacked / file).is_file()] == []
    assert len(files) > 150 and not (unpacked / "tests").exists()


def call(unpacked, folder, *words):
    return warm.call(*words, cwd=folder, environment={"PYTHONPATH": str(unpacked)})


def test_it_brings_the_command(unpacked, tmp_path):
    (entries,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "alignprop = alignprop.command:main" in entries.read_text()
    done = call(unpacked, tmp_path, "-m", "alignprop", "train", "--config=nothing")
    assert done.returncode == 1 and "--config = 'nothing' is not one of 'aesthetic'" in done.stderr


def test_it_trains_outside_of_the_repository(unpacked, tmp_path):
    ended = call(unpacked, tmp_path, "-c", TRAINING)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-2:] == [str(unpacked)] * 2
    assert (tmp_path / "logs" / "run" / "checkpoints" / "checkpoint_1").is_dir()
