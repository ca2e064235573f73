"""Every command in the documentation runs, with a small model and small rewards in the place of the large ones.

What it is given besides is in docs_stand_ins.py and docs_scripts.py; one that needs more to become small fails until it
has it.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import alignprop
from alignprop import command
from alignprop.settings.resolve import resolve
from tests.helpers.docs_commands import (
    COMMANDS,
    FLAG_BLOCKS,
    FLAGS,
    INSTALLED,
    MAIN,
    PAGES,
    ROOT,
    SCRIPT,
    SCRIPTS,
    SNIPPETS,
    covering,
    overlooked,
)
from tests.helpers.docs_scripts import ELSEWHERE, SMALLER
from tests.helpers.docs_stand_ins import StandIns, lay_out, make_environment, parsed
from tests.helpers.fake_hub import logged_in
from tests.helpers.toy_rewards import redness

pytestmark = pytest.mark.usefixtures("offline")

RESULTS = {
    "train": "logs/*/checkpoints/checkpoint_*/pytorch_lora_weights.safetensors", "evaluate": "logs/*/eval/*/scores.csv",
    "evaluate_soup": "logs/*/eval/*/soup.png", "guide": "logs/*/eval/*/guide.json",
}  # fmt: skip


def title(words) -> str:
    return (" ".join(words) if isinstance(words, tuple) else words.partition("\n")[0])[:80]


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


@pytest.fixture
def stand(stand_ins, tmp_path, monkeypatch):
    """Called with a text: makes the folder that it can be run in, and goes there."""

    def go(text) -> Path:
        lay_out(tmp_path, stand_ins, text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])  # a reward of one's own is searched for in this folder
        monkeypatch.setenv("WANDB_MODE", "disabled")
        monkeypatch.setenv("JUDGE_KEY", "a key")
        monkeypatch.setattr("rewards.ocr.load_recogniser", lambda: lambda picture: "open")  # of an optional package
        return tmp_path

    yield go
    sys.modules.pop("my_rewards", None)


def run(arguments, monkeypatch):
    """main.py with these arguments, in this process."""
    values = parsed(arguments)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    monkeypatch.setattr(command.flags, "FLAGS", values)
    command.run_parsed(["main.py"], "main.py")
    return values


def call(words, environment=()):
    """A process, from this folder, with what it printed."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **dict(environment)}
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# ---- main.py


@pytest.mark.parametrize("arguments", MAIN, ids=title)
def test_a_command_of_main_has_flags_that_fit_together(arguments, stand):
    stand(" ".join(arguments))
    resolve(parsed(arguments).config, num_processes=1)


@pytest.mark.parametrize("arguments", covering(MAIN), ids=title)
def test_a_command_of_main_runs(arguments, stand_ins, stand, monkeypatch, capsys):
    here = stand(" ".join(arguments))
    given = [*arguments, *stand_ins.flags(arguments)]
    values = run(given, monkeypatch)
    if values.plan:
        assert "\nfast " in capsys.readouterr().out
        return
    (result,) = here.glob(RESULTS[values.config.task])
    if values.config.resume_from == "latest":
        run(given, monkeypatch)
        assert [result] == [*here.glob(RESULTS[values.config.task])], "the second time it goes on, and is done"


@pytest.mark.parametrize("words", COMMANDS, ids=title)
def test_a_launcher_takes_its_flags_and_is_given_something_that_runs_here(words):
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    started = next(word for word in words if word.endswith((".py", ".sh")))
    assert started in ("main.py", "my_script.py") or re.match(SCRIPT, started)  # my_script.py is the page's snippet
    if words[:2] == ["accelerate", "launch"]:
        given = launch_command_parser().parse_args(words[2:])
        assert given.training_script == started
        assert given.config_file is None or (ROOT / given.config_file).is_file()
    if words[0] == "torchrun":
        assert get_args_parser().parse_args(words[1:]).training_script == started


# ---- the command `alignprop`


@pytest.mark.parametrize("words", [words for words in INSTALLED if words[0] not in command.TOOLS], ids=title)
def test_a_command_of_alignprop_has_flags_that_fit_together(words, stand):
    stand(" ".join(words))
    task, *arguments = words
    given = [*command.with_preset(arguments, command.TASKS[task]), *command._of_task(task)]
    resolve(parsed(given).config, num_processes=1)


@pytest.mark.parametrize("words", [words for words in INSTALLED if words[0] in command.TOOLS], ids=title)
def test_a_tool_of_alignprop_runs(words, stand, monkeypatch):
    here = stand(" ".join(words))
    monkeypatch.setattr(sys, "argv", ["alignprop", *words])
    command.main()
    assert (here / words[2]).stat().st_size


# ---- flags alone


@pytest.mark.parametrize("given", FLAG_BLOCKS, ids=title)
def test_a_block_of_flags_trains_the_bundled_model(given, stand_ins, stand, monkeypatch):
    here = stand("")
    run([*given, *stand_ins.flags(given)], monkeypatch)
    assert len([*here.glob(RESULTS["train"])]) == 1


@pytest.mark.parametrize("given", FLAGS, ids=title)
def test_flags_in_a_sentence_are_those_of_a_run(given, stand):
    stand("")
    resolve(parsed(given).config, num_processes=1)


# ---- scripts


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with logged_in("user", "hf_token", monkeypatch, tmp_path_factory.mktemp("home")) as stand_in:
        yield stand_in


@pytest.mark.parametrize(("script", "arguments"), [s for s in SCRIPTS if s[0] not in ELSEWHERE], ids=title)
def test_a_script_runs(script, arguments, stand_ins, stand, hub, monkeypatch):
    assert script in SMALLER, "tests/helpers/docs_scripts.py has to say what makes it small"
    here = stand(" ".join(arguments))
    smaller, left = SMALLER[script]
    words = [*arguments, *smaller(stand_ins, monkeypatch)]
    if script.endswith(".sh"):
        make_environment(here)
        call(["bash", script, *words], {"PYTHON": str(here / ".venv" / "bin" / "python")})
    else:
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(script, run_name="__main__")
    assert not left or [*here.glob(left)]
    assert [*hub.repositories] == re.findall(r"--repo (\S+)", " ".join(arguments))


@pytest.mark.parametrize("script", ELSEWHERE)
def test_a_script_that_takes_minutes_is_run_by_a_test_of_its_own(script, monkeypatch, capsys):
    text = (ROOT / ELSEWHERE[script]).read_text(encoding="utf-8")
    module = script.removesuffix(".py").replace("/", ".")
    parent, _, name = module.rpartition(".")
    assert re.search(rf"^from ({module}|{parent}) import .*\b({name}|main)\b", text, re.MULTILINE)
    assert re.search(rf"^ +({name}\.)?main\(\)", text, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    given = [word for called, words in SCRIPTS if called == script for word in words if word.startswith("--")]
    shown = capsys.readouterr().out
    assert not [flag for flag in given if flag not in shown]


def test_scripts_need_nothing_that_only_tests_need():
    """A person who runs them may have installed requirements.txt alone."""
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "scripts").rglob("*.py")) if "trl_" not in path.name]
    modules = [".".join(path.with_suffix("").parts) for path in files]
    without = "import sys; sys.path.insert(0, '.'); sys.modules.update(pytest=None, xdist=None, ruff=None)"
    subprocess.run([sys.executable, "-c", f"{without}; import {', '.join(modules)}"], cwd=ROOT, check=True)


# ---- Python


def small_trainer(trainer, stand_ins):
    """As a trainer is called, with a configuration that is small."""

    def build(config, *arguments, **options):
        config.update_from_flattened_dict({**stand_ins.fields(config), "log_with": ""})
        return trainer(config, *arguments, **options)

    return build


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=title)
def test_python_runs(page, code, stand_ins, stand, monkeypatch):
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", "alignprop/assets/tiny/pipeline")
    code = re.sub(r"checkpoint_\d+", "checkpoint_1", code)  # the only one of the run that is here
    program = compile(code, page, "exec")
    if code.startswith("from trl import"):  # it is not installed
        return
    stand(code)
    for name in ("AlignPropTrainer", "DDPOTrainer"):
        monkeypatch.setitem(vars(alignprop), name, small_trainer(getattr(alignprop, name), stand_ins))
    names = {"reward_function": redness, "prompt_function": lambda: ("a cat", {}), "__name__": "my_script"}
    exec(program, names | dict.fromkeys(["hook", "image_samples_hook"], lambda data, global_step, tracker: None))


# ---- all of it


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_nothing_is_overlooked():
    assert len(MAIN) > 20 and len(SCRIPTS) > 8 and len(FLAG_BLOCKS) > 1 and len(FLAGS) > 5 and len(SNIPPETS) > 4
    found = [line for page in PAGES for line in overlooked(page)]
    assert [line for line in found if '"$@"' not in line] == []  # what is passed on by a script is test_slurm_doc.py's
