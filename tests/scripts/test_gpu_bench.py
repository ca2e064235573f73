"""scripts/bench/gpu.py: on the CPU with the bundled sizes, its GPU's side with stand-ins, and its arithmetic."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignprop.memory.forecast import GIB, Forecast
from alignprop.memory.planner import skeletons
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.options import memory_policy
from alignprop.settings.resolve import resolve
from scripts.bench import full_size, gpu
from scripts.bench.full_size import Case, RandomAesthetic, build_trainer
from scripts.bench.gpu import cases, cells, fastest, report, table
from tests.helpers.tiny_families import TINY as FAMILIES

SCRIPT = Path(gpu.__file__)


# ---- what is measured


def test_everything_with_everything_and_variants_with_one_policy_alone():
    found = cases(["sd15", "sdxl"], ["fast", "small"], [1, 4], [1, 50], 50, ["compile"])
    plain, varied = found[:16], found[16:]
    assert len(set(plain)) == 16 and all(case.variant == "" for case in plain)
    assert varied == [Case(m, "fast", 4, k, 50, "compile") for m in ("sd15", "sdxl") for k in (1, 50)]
    assert [case.active for case in cases(["tiny"], ["fast"], [1], [1, 50], 20, [])] == [1], "there are but 20 steps"


def test_a_case_is_one_micro_batch_in_one_piece():
    case = Case("sdxl", "smallest", 8, 10, 50, "channels_last+compile")
    c = resolve(case.configuration(), 1)
    assert "xl" in c.pretrained.model and c.mixed_precision == c.aesthetic.dtype.replace("bfloat", "bf") == "bf16"
    assert (c.per_gpu_capacity, c.train.total_batch_size, c.trunc_backprop_timestep) == (8, 8, 40)
    memory = memory_policy(c)
    assert (memory.sweep_chunk, memory.decode_chunk, memory.residency) == (0, 0, "phase")
    assert memory.block_checkpointing and c.channels_last and c.compile
    plain = Case("sdxl", "smallest", 8, 10).configuration()
    assert not plain.channels_last and not plain.compile


def test_the_random_reward_has_the_shapes_of_the_planned_one():
    case = Case("tiny", "fast", 1, 1, 2)
    config = resolve(case.configuration(), 1)
    reward = RandomAesthetic(config, "cpu")
    planned = skeletons(config)()[1].reward.terms["aesthetic"]
    shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (reward, planned)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20
    scores = reward(torch.rand(2, 3, 64, 64, requires_grad=True), ["", ""])
    assert scores.shape == (2,) and scores.isfinite().all() and scores.requires_grad


def test_the_measured_step_trains(tmp_path):
    trainer = build_trainer(Case("tiny", "balanced", 2, 1, 2), "cpu", str(tmp_path))
    before = [p.detach().clone() for p in trainer.weights.parameters]
    row = trainer.step()
    assert row["skipped_steps"] == 0 and row["active_steps"] == 1 and row["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))
    assert trainer.run.choice.policy == "balanced" and trainer.run.choice.memory.decoder_checkpointing


def test_a_family_that_encodes_no_prompts_is_measured_too(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "find_config", lambda name: FAMILIES["sdxl"])
    trainer = build_trainer(Case("tiny", "smallest", 2, 2, 2, "channels_last"), "cpu", str(tmp_path))
    row = trainer.step()
    assert row["skipped_steps"] == 0 and row["active_steps"] == 2 and row["grad_norm"] > 0


# ---- the GPU's side


@pytest.fixture
def fake_gpu(monkeypatch):
    """What torch says of a GPU of 16 GiB, 1 of them outside of its allocator; and what it was told."""
    said = SimpleNamespace(log=[], reserved=3 * GIB)
    note = lambda name: lambda *args: said.log.append((name, *args))  # noqa: E731
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, note(name))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15 * GIB - said.reserved, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: said.reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * GIB)
    return said


@pytest.fixture
def steps(monkeypatch):
    """Trainers that only log their steps; an exception put there is raised by the next."""
    found = []

    def step():
        if found and isinstance(found[-1], BaseException):
            raise found.pop()
        found.append("step")

    monkeypatch.setattr(gpu, "build_trainer", lambda case, made_on, folder: SimpleNamespace(step=step))
    return found


def test_the_first_step_counts_neither_for_time_nor_for_memory(fake_gpu, steps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: steps.append("reset"))
    case = Case("sd15", "fast", 4, 1)
    row = gpu.measure(case, "cuda", repeats=3, made_on="cpu")
    assert steps == ["step", "reset", "step", "step", "step"]
    assert len(row.pop("seconds")) == 3
    assert row == {**asdict(case), "peak": 2 * GIB, "reserved": 5 * GIB, "outside": GIB}
    assert fake_gpu.log.count(("synchronize",)) == 6, "before and after each"


def test_running_out_of_memory_is_a_result(fake_gpu, steps):
    steps.append(torch.OutOfMemoryError("no room"))
    case = Case("sd15", "roomy", 8, 50)
    assert gpu.measure(case, "cuda", 3, "cuda") == {**asdict(case), "error": "out of memory"}


def test_a_limit_includes_what_lies_outside_of_the_allocator(fake_gpu):
    gpu.hold_to(5)
    assert fake_gpu.log == [("set_per_process_memory_fraction", 4 / 16)]


@pytest.mark.parametrize(("gib", "policy", "chunk"), [(90, "fast", 4), (9, "fast", 2), (3, "smallest", 1)])
def test_the_fastest_that_fits_a_limit_with_as_many_samples_as_can_be(monkeypatch, gib, policy, chunk):
    per_sample = dict.fromkeys(POLICIES, 8.0) | {"roomy": 90.0, "fast": 3.0, "smallest": 2.0}
    asked = []

    def expected(case, done):
        asked.append(case)
        return Forecast(case.policy, case.chunk, {"sweep": int(per_sample[case.policy] * case.chunk * GIB)}, 1.0)

    monkeypatch.setattr(gpu, "expected", expected)
    assert fastest(gib, "sd15", 50) == Case("sd15", policy, chunk, 50, 50)
    assert all(case.active == case.steps == 50 for case in asked)
    with pytest.raises(SystemExit, match=r"--limit_gib = 2 fits no policy: the smallest takes 2\.00 GiB"):
        fastest(2, "sd15", 50)


# ---- the table


FORECAST = Forecast("fast", 4, {"sweep": 2 * GIB, "decode": GIB}, 1e12)  # FLOPs of a sample
ROW = asdict(Case("sd15", "fast", 4, 50, 50, "compile"))


def test_a_row_has_the_median_of_a_sample_and_its_share_of_the_devices_pace():
    row = {**ROW, "seconds": [9.0, 2.0, 1.0], "peak": 3 * GIB, "reserved": 4 * GIB, "outside": GIB // 2}
    assert cells(row, FORECAST, 8e12) == [
        "sd15", "fast", "4", "50", "compile", "", "0.5", "3.00", "2.00 (+50.0%)", "4.00", "0.50", "2 (25%)",
    ]  # fmt: skip


def test_a_row_without_memory_and_a_row_that_did_not_fit():
    assert cells({**ROW, "seconds": [4.0]}, FORECAST, 1e12)[6:] == ["1", "", "2.00", "", "", "1 (100%)"]
    assert cells({**ROW, "error": "out of memory"}, FORECAST, 1e12)[6:] == ["out of memory", "", "2.00", "", "", ""]
    lines = table([{**ROW, "seconds": [4.0]}, {**ROW, "error": "out of memory"}], [FORECAST] * 2, 1e12).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


def test_the_report_names_the_device_and_its_pace(monkeypatch):
    monkeypatch.setattr(gpu, "expected", lambda case, done: FORECAST)
    measured = {
        "facts": {"torch": "2", "device": "Some GPU", "context": GIB // 4, "flops_per_second": 5e14},
        "rows": [{**ROW, "seconds": [4.0]}],
    }
    first, empty, *lines = report(measured).splitlines()
    assert first == "Some GPU, torch 2, its context 0.25 GiB; a large matrix product 500 TFLOP/s"
    assert not empty and len(lines) == 3


# ---- the command


def run_script(*options):
    return subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True)


def test_the_script_runs_to_its_end_on_a_cpu(tmp_path):
    options = ["--policies", "smallest", "--chunks", 1, "--steps", 2, "--active", 2, "--repeats", 1]
    file = tmp_path / "out.json"
    done = run_script("--models", "tiny", "--device", "cpu", *options, "--json", file)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(file.read_text())["rows"]
    assert row["seconds"][0] > 0 and "peak" not in row
    assert "| tiny  | smallest | 1     | 2 |" in done.stdout


def test_an_earlier_run_is_printed_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "expected", lambda case, done: FORECAST)
    facts = {"torch": "2", "device": "Some GPU", "context": GIB, "flops_per_second": 1e12}
    (tmp_path / "out.json").write_text(json.dumps({"facts": facts, "rows": [{**ROW, "seconds": [1.0]}]}))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--table", str(tmp_path / "out.json")])
    gpu.main()
    assert "Some GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "error: there is no GPU here; without one, only --models tiny --device cpu runs"),
        (["--limit_gib", "4"], "error: there is no GPU here"),
        (["--device", "cpu"], "--device cpu is for --models tiny: full size, and a limit, need a GPU"),
        (["--device", "cpu", "--models", "tiny", "--limit_gib", "4"], "need a GPU"),
        (["--device", "cpu", "--models", "tiny", "--no_table"], "--no_table leaves nothing without --json"),
        (["--policies", "fast,faster"], "'faster' is not one of roomy, fast"),
    ],
)
def test_what_needs_a_gpu_says_so(monkeypatch, capsys, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as ending:
        gpu.main()
    assert said in f"{ending.value.code}{capsys.readouterr().err}" and ending.value.code != 0


def test_a_limit_that_was_too_small_is_an_error(monkeypatch, fake_gpu, steps, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda device: {"torch": "2", "device": "x", "context": 0, "flops_per_second": 1})
    monkeypatch.setattr(gpu, "expected", lambda case, done: FORECAST)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--limit_gib", "4"])
    gpu.main()
    assert ("set_per_process_memory_fraction", 3 / 16) in fake_gpu.log
    steps.append(torch.OutOfMemoryError("no room"))
    with pytest.raises(SystemExit, match="it did not fit --limit_gib = 4"):
        gpu.main()
    assert capsys.readouterr().out.count("| sd15  |") == 2
