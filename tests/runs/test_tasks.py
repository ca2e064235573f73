"""Planning as a person sees it; evaluating and mixing are in test_evaluate.py and test_soups.py."""

import pytest

from alignprop.settings.memory_policies import POLICIES
from alignprop.tasks.plan import compare_policies
from tests.helpers import warm


def test_a_plan_names_every_policy_and_the_first_that_fits(toy_config, capsys):
    forecasts = compare_policies(toy_config(), gpu_memory=8.0)
    lines = capsys.readouterr().out.splitlines()
    assert [f.policy for f in forecasts] == list(POLICIES)
    assert [line.split()[0] for line in lines[2 : 2 + len(POLICIES)]] == list(POLICIES)
    assert lines[-1] == ("The fastest that fits 8 GiB: --config.memory_policy=roomy --config.per_gpu_capacity=2")


def test_a_plan_for_too_small_a_gpu_says_so(toy_config, capsys):
    compare_policies(toy_config(memory_policy="fast", pretrained__denoiser="x.gguf"), gpu_memory=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("pretrained.denoiser counts as float32,") and lines[-1] == "None fits 0.1 GiB."


def test_a_plan_for_a_named_gpu_has_its_memory_and_seconds(toy_config, capsys):
    config = toy_config(memory_policy="fast", per_gpu_capacity="auto")
    compare_policies(config, gpu="4060ti")
    header, line = capsys.readouterr().out.splitlines()[1:3]
    assert header.endswith("s/sample") and 0 < float(line.split()[-2]) < 60 and line.endswith("  fits")
    (found,) = compare_policies(config, gpu="4060ti", gpu_memory=20.0)
    assert "The fastest that fits 20 GiB" in capsys.readouterr().out and found.capacity == 4


def test_without_a_gpu_a_plan_names_the_fastest_policy_for_each_size(toy_config, capsys):
    forecasts = compare_policies(toy_config(memory_policy="fast", per_gpu_capacity="auto"))
    assert [f.capacity for f in forecasts] == [4, 2, 1]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("The fastest by the GiB of a GPU: 8: fast with 4, 12:")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config=config/align_prop.py:tiny_evaluate", "--plan"], "task = 'evaluate' does not train"),
    (["--gpu_memory=8"], "--gpu_memory needs --plan"),
    (["--gpu=4090"], "--gpu needs --plan"),
    (["--plan", "--gpu=gtx"], "--gpu=gtx"),
    (["--plan", "--gpu_memory=nan"], "--gpu_memory = nan must be a finite number of GiB"),
])  # fmt: skip
def test_mistakes_about_planning_are_one_line(arguments, message):
    done = warm.call("main.py", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
