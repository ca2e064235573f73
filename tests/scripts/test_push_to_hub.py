"""The script by itself, as a person calls it."""

import os
import subprocess
import sys

import pytest

from tests.cli.test_main import ROOT


def run_script(*arguments):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "scripts/push_to_hub.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(("arguments", "message"), [
    (["{here}", "--repo", "me/a--b"], "error: --repo = 'me/a--b' must be 'user/name'"),
    (["{here}", "--repo", ""], "error: --repo = '' must be 'user/name'"),
    (["{here}", "--repo", "me/toy", "--private"], "error: '{here}' is not a run folder"),
])  # fmt: skip
def test_a_mistake_is_one_plain_line(tmp_path, arguments, message):
    done = run_script(*(argument.replace("{here}", str(tmp_path)) for argument in arguments))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(message.replace("{here}", str(tmp_path)))
