"""Planning as a person sees it; evaluating and mixing are in test_evaluate.py and test_soups.py."""

import pytest

from alignprop.settings.memory_policies import POLICIES
from alignprop.tasks import compare_policies
from tests.helpers import warm


def test_a_plan_names_every_policy_and_the_first_that_fits(toy_config, capsys):
    forecasts = compare_policies(toy_config(), gpu_memory=8.0)
    lines = capsys.readouterr().out.splitlines()
    assert [f.policy for f in forecasts] == list(POLICIES)
    assert [line.split()[0] for line in lines[2 : 2 + len(POLICIES)]] == list(POLICIES)
    assert lines[-1] == ("The fastest that fits 8 GiB: --config.memory_policy=roomy --config.per_gpu_capacity=2")


def test_a_plan_for_too_small_a_gpu_says_so(toy_config, capsys):
    compare_policies(toy_config(memory_policy="fast"), gpu_memory=0.1)
    assert capsys.readouterr().out.splitlines()[-1] == "None fits 0.1 GiB."


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config=config/align_prop.py:tiny_evaluate", "--plan"], "task = 'evaluate' does not train"),
    (["--gpu_memory=8"], "--gpu_memory needs --plan"),
    (["--plan", "--gpu_memory=nan"], "--gpu_memory = nan must be a finite number of GiB"),
])  # fmt: skip
def test_mistakes_about_planning_are_one_line(arguments, message):
    done = warm.call("main.py", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
