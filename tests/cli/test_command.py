"""The installed command: what it makes of its arguments, and that it does what main.py does."""

import re
from pathlib import Path

import pytest

from alignprop.command import preset_file, with_preset
from alignprop.settings.errors import ConfigError
from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
TINY = (
    "--config.num_epochs=1", "--config.num_inference_steps=2", "--config.num_eval_images=2",
    "--config.train.total_batch_size=2", "--config.train.total_samples_per_epoch=2", "--config.eval_reward_fn=",
)  # fmt: skip


def command(*arguments, cwd):
    return warm.call("-m", "alignprop", *arguments, cwd=cwd)


@pytest.mark.parametrize(("name", "file"), [
    ("hps", "align_prop.py:hps"), ("flux", "models.py:flux"), ("compressibility", "ddpo.py:compressibility"),
    ("aesthetic", "align_prop.py:aesthetic"), ("ddpo:aesthetic", "ddpo.py:aesthetic"), ("models", "models.py"),
    ("config/align_prop.py:hps", "align_prop.py:hps"),
])  # fmt: skip
def test_a_preset_is_found_by_its_name_from_anywhere(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preset_file(name) == str(CONFIG / file)


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ddpo.py").write_text("")
    (tmp_path / "hps").mkdir()
    assert preset_file("hps") == str(CONFIG / "align_prop.py:hps")  # a folder is no configuration
    assert preset_file("ddpo.py:mine") == "ddpo.py:mine"
    with pytest.raises(ConfigError, match=r"^--config = 'hbs' is not one of .*; did you mean 'hps'"):
        preset_file("hbs")


@pytest.mark.parametrize("typed", [["--config=hps"], ["--config", "hps"], ["-config=hps"]])
def test_the_flag_may_be_written_in_any_way(typed):
    given = with_preset(["--config.seed=1", *typed], "evaluate")
    assert given[0] == "--config.seed=1" and given[-1].endswith("align_prop.py:hps")
    usual = f"--config={CONFIG}/align_prop.py:evaluate"
    assert with_preset(["--config.seed=1"], "evaluate") == [usual, "--config.seed=1"]


def test_main_takes_the_name_of_a_preset_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hps").mkdir()
    assert with_preset(["--config=hps"], "") == [f"--config={CONFIG}/align_prop.py:hps"]
    for typed in (["--config", "config/align_prop.py:hps"], ["--config=mine/align_prop.py:hps"], ["--help"]):
        assert with_preset(typed, "") == typed
    done = warm.call(str(CONFIG.parent / "main.py"), "--config=quikstart", cwd=tmp_path)
    assert done.returncode == 1
    assert re.match(r"error: --config = 'quikstart' is .*did you mean 'quickstart'", done.stderr)


def test_it_trains_evaluates_and_exports_outside_of_the_repository(tmp_path):
    trained = command("train", "--config=quickstart", "--config.run_name=r", *TINY, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert '"command": "alignprop train --config=quickstart' in (tmp_path / "logs" / "r" / "config.json").read_text()
    fields = ["--config.resume_from=logs/r", "--config.num_eval_images=2", "--config.num_inference_steps=2"]
    evaluated = command("evaluate", "--config", "quickstart", *fields, cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert list((tmp_path / "logs" / "r" / "eval").glob("*/summary.json"))
    exported = command("export", "logs/r", "lora.safetensors", "--format=kohya", cwd=tmp_path)
    assert exported.stdout == "lora.safetensors: written\n" and (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize(("arguments", "told"), [
    (["trian"], "error: command = 'trian' is not one of 'train', 'evaluate', .*; did you mean 'train'"),
    (["train", "--config=hbs"], "error: --config = 'hbs' is not one of .*'hps'"),
    (["plan", "--config.seed=-1"], "error: seed = -1 must be "),
    (["export", "nowhere", "x.safetensors", "--format=kohya"], "error: checkpoint = 'nowhere' does not exist"),
])  # fmt: skip
def test_a_mistake_is_one_line(arguments, told, tmp_path):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and re.match(told, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",)])
def test_without_a_command_it_says_which_there_are(arguments, tmp_path):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: alignprop COMMAND")
