"""Every command in the documentation is one: its preset, its fields and its flags exist, and its values are allowed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from alignprop.settings import resolve

ROOT = Path(__file__).resolve().parent.parent
CALL = r"(\S+=\S+ )*(accelerate|torchrun|python3?|bash|\S*bin/python) "
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of each command in an indented or inline block of code."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", text)
    called = [line for line in lines if re.match(CALL, line)]
    return [shlex.split(line, comments=True) for line in called]


def of_main(words: list[str]) -> list[str] | None:
    """The flags of main.py, where the command calls it with a configuration."""
    if "main.py" not in words or "…" in " ".join(words):
        return None
    return words[words.index("main.py") + 1 :]


MAIN = [(page.name, arguments) for page in PAGES for words in commands(page) if (arguments := of_main(words))]
SCRIPTS = sorted({
    (word, tuple(words[words.index(word) + 1 :]))
    for page in PAGES for words in commands(page) for word in words if re.match(r"scripts/\S+\.(py|sh)$", word)
})  # fmt: skip


@pytest.mark.parametrize(("page", "arguments"), MAIN, ids=lambda v: v if isinstance(v, str) else " ".join(v)[:70])
def test_a_command_of_main_is_a_configuration_that_can_run(page, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # where ml_collections looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_bool("plan", False, "", flag_values=values)
    flags.DEFINE_float("gpu_memory", None, "", flag_values=values)
    assert values(["main.py", *arguments]) == ["main.py"]
    resolve(values.config, num_processes=1)


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS, ids=lambda v: v if isinstance(v, str) else " ".join(v)[:50])
def test_a_script_exists_and_has_the_flags(script, arguments):
    assert (ROOT / script).is_file()
    named = [word.split("=")[0] for word in arguments if word.startswith("--") and not word.startswith("--config")]
    if script.endswith(".py") and named:
        command = [sys.executable, script, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and not [flag for flag in named if flag not in done.stdout], done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_there_are_commands():
    assert len(MAIN) > 20 and len(SCRIPTS) > 3
