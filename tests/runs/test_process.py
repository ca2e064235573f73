"""A reward in a process of its own, beside the same reward in this process."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed

from alignprop.settings.warnings import warnings_for
from rewards import RewardError, build_reward, parse_spec
from rewards.combine import try_reward
from rewards.skeleton import skeleton_reward
from tests.helpers.refusals import error_of
from tests.helpers.toy_rewards import Obedient, redness
from tests.unit.test_resolve import preset

ROOT = Path(__file__).resolve().parents[2]
HERE = f"process:{sys.executable}::"
OBEDIENT = f"{HERE}tests.helpers.toy_rewards:Obedient"


@pytest.fixture(scope="module")
def reward():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "7")  # as a launcher does
        return build_reward(OBEDIENT)


@pytest.fixture
def process(reward):
    """The number of the process."""
    return reward.terms[OBEDIENT].worker._process.pid


def pictures(*shape, layout=torch.contiguous_format):
    images = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=layout).requires_grad_()


def scores_and_gradient(reward, images, weights, words=("",), metadata=None):
    scores = reward(images, [*words, *[""] * (len(images) - len(words))], metadata)
    return scores, torch.autograd.grad(scores, images, torch.tensor(weights))[0]


def assert_alike(reward, images, weights, words=("",), metadata=None):
    """The same bits as in this process, and the same layout in memory."""
    ours, expected = (scores_and_gradient(r, images, weights, words, metadata) for r in (reward, Obedient()))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert ours[1].stride() == images.stride()


# ---- what it computes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 3, 8, 8), (3, 3, 24, 16), (1, 3, 40, 72), (3, 3, 16, 24)])
def test_scores_and_gradient_have_the_bits_of_the_same_function_here(reward, size, layout):
    assert_alike(reward, pictures(*size, layout=layout), [0.3, -1.7, 1e-3][: size[0]])


def seen_by(reward, images):
    """100 · rank + 10 · threads + whether there is to be a gradient, as the reward sees them."""
    return round((reward(images, ["looks"] * len(images)) - redness(images, 0, 0))[0].item())


def test_without_a_gradient_none_is_computed(reward):
    images = pictures(2, 3, 8, 8)
    with torch.no_grad():
        assert seen_by(reward, images) % 10 == 0 and not reward(images, ["", ""]).requires_grad
    assert seen_by(reward, images.detach()) % 10 == 0 and not reward(images.detach(), ["", ""]).requires_grad
    assert seen_by(reward, images) % 10 == 1


def test_it_has_the_threads_of_the_run_and_no_rank_of_its_launcher(reward):
    assert seen_by(reward, pictures(1, 3, 8, 8)) == -100 + 10 * torch.get_num_threads() + 1


def test_an_earlier_batch_can_still_have_its_gradient(reward):
    images = pictures(2, 3, 8, 8)
    first, second = reward(images, ["", ""]), reward(images * 0.5, ["", ""])
    (gradient,) = torch.autograd.grad((first * second).sum(), images)
    expected = torch.autograd.grad((redness(images, 0, 0) * redness(images * 0.5, 0, 0)).sum(), images)[0]
    torch.testing.assert_close(gradient, expected)


def test_any_prompt_and_metadata_arrive(reward):
    metadata = [{"größe": {"x": [0.1, None]}}, {"größe": {"x": [2, "熊"]}}]
    assert_alike(reward, pictures(2, 3, 8, 8), [1.0, 2.0], ("reads", "ein Bär, 熊 😀\n\x00\ud800"), metadata)
    message = error_of(reward, pictures(1, 3, 8, 8), ["reads"], [{"größe": object()}])
    assert "metadata" in message and "object" in message


def test_what_the_reward_prints_disturbs_nothing(reward):
    assert_alike(reward, pictures(2, 3, 8, 8), [1.0, 2.0], ("prints",))


def test_it_draws_what_it_would_draw_here(reward):
    for seed in (1, 2, 1):
        set_seed(seed)
        ours = [reward(pictures(1, 3, 8, 8), ["draws"]) for _ in range(2)]
        expected = [Obedient()(pictures(1, 3, 8, 8), ["draws"], None) for _ in range(2)]
        assert torch.equal(torch.cat(ours), torch.cat(expected)) and ours[0] != ours[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another folder, and an interpreter that has the packages of this environment but not the project."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={Path(torch.__file__).parents[1]} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("clip", "my_own"):
        sys.modules.pop(name, None)


MY_OWN = """
from clip import SCALE
from rewards.base import Reward

class Mine(Reward):
    def score(self, images, prompts, metadata):
        return SCALE * images.mean(dim=(1, 2, 3))

class Other(Mine):
    differentiable = False
"""


@pytest.mark.parametrize(("name", "differentiable"), [("my_own:Mine", True), ("my_own:Other", False), ("colour", True)])
def test_rewards_made_from_the_projects_classes(elsewhere, name, differentiable):
    (elsewhere / "my_own.py").write_text(MY_OWN)
    (elsewhere / "clip.py").write_text("SCALE = 3")  # the project has a file of that name
    options, images = {"colour": {"target": (1.0, 0.0, 0.5)}}, pictures(2, 3, 16, 16)
    ours, expected = (build_reward(prefix + name, options) for prefix in (f"process:{elsewhere}/python::", ""))
    assert ours.differentiable == expected.differentiable == differentiable
    scores = ours(images, ["", ""])
    assert torch.equal(scores, expected(images, ["", ""])) and scores.requires_grad == differentiable
    try_reward(ours, images.detach(), ["", ""], None, needs_gradient=differentiable)


# ---- mistakes


def test_the_spec_is_parsed():
    terms = {"process:/a b/python::my.mod:f": 0.5, "process:py@cuda:1::hps": -2.0, "clip": 10.0}
    assert parse_spec("process:/a b/python::my.mod:f:0.5, process:py@cuda:1:: hps:-2 ,clip:10") == terms


@pytest.mark.parametrize("spec", [
    "process:/x/python:my:f", "process:::my:f", "/x/python::my:f", "process:/x/python::", "process:/x/python::hpss",
    "process:/x/python::my", "process:/x/python::my:f:0", "process:/x/python::my:f,process:/x/python::my:f",
])  # fmt: skip
def test_a_bad_spec_is_one_line(spec):
    assert repr(spec) in error_of(parse_spec, spec)


@pytest.fixture
def programs(tmp_path):
    """A folder with an interpreter without torch, and with what is no interpreter."""
    texts = {
        "without_torch": f'#!/bin/sh\nexec {sys.executable} -S "$@"\n',
        "other": "#!/bin/sh\necho no >&2\nexit 4\n",
    }
    for name, text in {**texts, "broken": "not a program", "plain": ""}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
    return tmp_path


@pytest.mark.parametrize(("python", "part"), [
    ("nowhere/python", "'nowhere/python' is not an executable file; it must be the Python interpreter"),
    ("plain", "/plain' is not an executable file"),
    (".", "is not an executable file"),
    ("without_torch@gpu", "without_torch@gpu' is not an executable file; .* with @cpu, @cuda or @cuda:N behind it"),
    ("broken", "/broken' cannot be started: Exec format error"),
    ("other", "its process ended with exit status 4; its last line was 'no'"),
    ("without_torch", "has no usable torch: ModuleNotFoundError: No module named 'torch'"),
])  # fmt: skip
def test_an_interpreter_that_cannot_be_used_is_one_line(programs, python, part):
    path = python if python.startswith("nowhere") else programs / python
    with pytest.raises(RewardError, match=rf"^reward 'process:.*::my:f': .*{part}") as refused:
        build_reward(f"process:{path}::my:f")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "part"), [
    ("no_such:f", "cannot import 'no_such': ModuleNotFoundError: No module named 'no_such'"),
    ("tests.helpers.toy_rewards:rednes", "has no 'rednes'; did you mean 'redness'?"),
])  # fmt: skip
def test_a_reward_that_is_not_there_is_one_line(name, part):
    assert f"reward '{HERE}{name}': " in (message := error_of(build_reward, HERE + name)) and part in message


def test_an_error_inside_has_its_type_text_and_place(reward):
    lines = (ROOT / "tests" / "helpers" / "toy_rewards.py").read_text(encoding="utf-8").splitlines()
    place = next(n for n, line in enumerate(lines, 1) if "interpolate(" in line)
    message = error_of(reward, pictures(1, 3, 8, 8), ["fails"])
    assert message.startswith(f"reward '{OBEDIENT}' failed: NotImplementedError: ")
    assert message.endswith(f"toy_rewards.py, line {place})")
    assert_alike(reward, pictures(2, 3, 8, 8), [1.0, 2.0])  # the next question is answered


@pytest.mark.parametrize("name", ["detached", "hidden_rating", "not_a_number", "wrong_shape"])
def test_a_reward_that_is_no_use_is_refused_as_it_is_here(name):
    """The messages differ in nothing but the name."""
    images, spec = pictures(2, 3, 8, 8).detach(), f"tests.helpers.toy_rewards:{name}"
    ours, expected = (
        error_of(try_reward, build_reward(prefix + spec), images, ["", ""], None, True) for prefix in (HERE, "")
    )
    assert ours == expected.replace(spec, HERE + spec)


def test_a_plan_counts_nothing_for_it_and_needs_no_interpreter():
    assert not [*skeleton_reward("process:nowhere::my:f,process:nowhere::hps", {}, lambda *_: {}).parameters()]


def test_the_options_of_a_built_in_reward_have_an_effect_there():
    assert warnings_for(preset(reward_fn="process:x@cpu::hps:2", eval_reward_fn=""), ["hps.version"]) == []
    assert len(warnings_for(preset(reward_fn="process:x@cpu::my:hps", eval_reward_fn=""), ["hps.version"])) == 1


# ---- how it ends


def test_a_death_is_told_and_mended_once(capsys):
    reward, images = build_reward(OBEDIENT), pictures(2, 3, 8, 8)
    term = reward.terms[OBEDIENT]
    scores = reward(images, ["", ""])
    first = term.worker._process.pid
    os.kill(first, signal.SIGKILL)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert torch.equal(gradient, torch.autograd.grad(redness(images, 0, 0).sum(), images)[0])
    assert term.worker._process.pid != first
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert OBEDIENT in warning and "exit status -9 (Killed)" in warning
    message = error_of(reward, images, ["exits", ""])
    assert message == f"reward '{OBEDIENT}': its process ended with exit status 3; its last line was 'the last words'"


def test_a_process_that_does_not_answer_is_ended(monkeypatch):
    reward = build_reward(OBEDIENT)
    monkeypatch.setattr("rewards.connection.TIMEOUT", 0.5)
    began = time.monotonic()
    assert "has not answered in 0.5 s" in error_of(reward, pictures(1, 3, 8, 8), ["sleeps"])
    assert time.monotonic() - began < 15
    assert reward.terms[OBEDIENT].worker._process.wait(timeout=10) == -signal.SIGKILL


def test_signals_that_ask_the_run_to_stop_do_not_end_it(reward, process):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process, number)
    assert_alike(reward, pictures(2, 3, 8, 8), [1.0, 2.0])
    assert reward.terms[OBEDIENT].worker._process.pid == process


def test_it_ends_when_the_run_is_killed():
    program = (
        f"import time; from rewards import build_reward; reward = build_reward({OBEDIENT!r})\n"
        f"print(reward.terms[{OBEDIENT!r}].worker._process.pid, flush=True); time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process = int(run.stdout.readline())
    assert is_alive(process)
    run.kill()
    run.wait()
    end = time.monotonic() + 30
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(process)


def is_alive(process: int) -> bool:
    """Whether a process runs. One that has ended, and that nobody has waited for, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_ends_when_nobody_has_the_reward_any_more():
    reward = build_reward(OBEDIENT)
    process = reward.terms[OBEDIENT].worker._process.pid
    del reward
    assert not is_alive(process)


def test_its_program_can_be_read_by_an_old_python_without_the_project():
    tree = ast.parse((ROOT / "rewards" / "worker.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    imports = [node for node in tree.body if isinstance(node, ast.Import)]
    names = {alias.name.partition(".")[0] for node in imports for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names < {*sys.stdlib_module_names}
