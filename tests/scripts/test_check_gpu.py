"""scripts/check_gpu.py: order and time, a file after every row, rows that die, wheels; and the command on the CPU."""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import check_gpu
from scripts.check_gpu import ROWS, START, TESTS, cells, check, environment_of, expected_seconds, flags, run, table

FACTS = {"device": "Some GPU", "torch": "2", "flops_per_second": 8e12}
MEASURED = {
    **ROWS[0], "wall_seconds": 40.0, "facts": FACTS, "seconds": [8.0, 4.0], "peak": 3 * 2**30,
    "forecast": {"peak": 2 * 2**30, "flops": 4e12},
}  # fmt: skip


def options(tmp_path, **changes):
    defaults = {"minutes": 8.0, "wheels": None, "json": tmp_path / "out.json", "table": None, "tiny": False}
    return argparse.Namespace(**defaults | changes)


def test_the_rows_are_those_that_are_asked_for():
    """Each model at K = 1 and 50 in both policies, and all 50 steps within 4 GiB; both models at K = 1 first.

    FLUX has packed weights, on the device and streaming.
    """
    packed = {(r["model"], r["policy"], r["quantize"]) for r in ROWS if "quantize" in r}
    assert packed == {
        ("flux", "balanced", "int8"), ("flux", "streaming", "int4"), ("flux", "balanced", "fp8"),
        ("flux", "smallest", "nf4"),
    }  # fmt: skip
    assert [r["quantize"] for r in ROWS if r.get("products")] == ["fp8"]
    cases = {(r["model"], r["policy"], r["active"]) for r in ROWS if not {"limit_gib", "quantize"} & r.keys()}
    assert cases == {(m, p, k) for m in ("sd15", "sdxl") for p in ("balanced", "lean") for k in (1, 50)}
    assert [r["limit_gib"] for r in ROWS if "limit_gib" in r] == [4.0]
    assert [r["model"] for r in ROWS[:2]] == ["sd15", "sdxl"]


def test_the_file_is_whole_after_every_row(tmp_path, monkeypatch):
    def measure(row, *_):
        written = json.loads((tmp_path / "out.json").read_text())["rows"]
        assert len(written) == 1 + ROWS.index(row)
        return {**row, "wall_seconds": 1.0}

    monkeypatch.setattr(check_gpu, "run_tests", lambda *_: {**TESTS, "result": "3 passed", "wall_seconds": 1.0})
    monkeypatch.setattr(check_gpu, "measure", measure)
    report = check(options(tmp_path), {})
    assert [row for row in report["rows"] if "skipped" in row] == []
    assert json.loads((tmp_path / "out.json").read_text()) == report and len(report["rows"]) == 1 + len(ROWS)


def test_a_row_that_would_not_end_in_time_is_not_begun(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 100))  # each row takes 100 s
    monkeypatch.setattr(check_gpu.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(check_gpu, "run_tests", lambda *_: {**TESTS, "result": "3 passed"})
    monkeypatch.setattr(check_gpu, "measure", lambda row, *_: {**row, "wall_seconds": 100.0})
    rows = check(options(tmp_path), {})["rows"]
    begun = [row for row in rows if "skipped" not in row]
    assert 3 <= len(begun) < len(rows) and rows[-1]["skipped"].startswith("no time")


def test_what_a_row_is_expected_to_take():
    row = {"model": "sd15", "active": 1}
    before = [{**row, "wall_seconds": 40.0}]
    assert expected_seconds({"model": "sdxl", "active": 1}, before) == START
    assert expected_seconds(row, before) == 40.0
    assert expected_seconds({**row, "active": 50}, [{**row, "wall_seconds": 60.0}]) == 90.0


def test_a_row_that_dies_has_its_last_line_and_costs_no_other(tmp_path, monkeypatch):
    dies = [sys.executable, "-c", "print('one'); raise SystemExit('CUDA error: an illegal memory access')"]
    monkeypatch.setattr(check_gpu, "run", lambda command, environment, seconds: run(dies, environment, seconds))
    row = check_gpu.measure(ROWS[0], 60.0, environment_of(None, tmp_path), tiny=False)
    assert row["error"] == "CUDA error: an illegal memory access" and row["output"].startswith("one\n")
    assert cells(row)[-1] == row["error"]


def test_a_row_that_hangs_is_ended():
    code, output = run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], {}, 3.0)
    assert code == 124 and output.startswith("begun") and output.endswith("ended after 3 s")


def test_tests_that_fail_are_named(monkeypatch):
    monkeypatch.setattr(
        check_gpu, "run", lambda *_: (1, "…\nFAILED tests/gpu/test_x.py::test_y - E\n1 failed in 2 s\n")
    )
    row = check_gpu.run_tests(60.0, {}, tiny=False)
    assert row["error"] == "FAILED tests/gpu/test_x.py::test_y - E" and row["result"] == "1 failed in 2 s"


def test_wheels_are_imported_before_what_is_installed(tmp_path):
    wheels, unpacked = tmp_path / "wheels", tmp_path / "unpacked"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "diffusers-9.9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("diffusers/__init__.py", "__version__ = 'of the wheel'\n")
    environment = environment_of(wheels, unpacked)
    code, output = run([sys.executable, "-c", "import diffusers; print(diffusers.__version__)"], environment, 60.0)
    assert (code, output) == (0, "of the wheel\n")
    with pytest.raises(SystemExit, match=r"holds no \.whl file"):
        environment_of(tmp_path / "unpacked", tmp_path / "x")


def test_the_flags_of_a_row_are_those_of_the_benchmark():
    assert flags(ROWS[3]) == [
        "--variants=", "--models=sd15", "--policies=smallest", "--chunks=1", "--active=50", "--limit_gib=4.0",
    ]  # fmt: skip


def test_the_table_of_a_run_that_was_cut_short():
    report = {"rows": [{**TESTS, "result": "14 passed in 60 s"}, MEASURED, {**ROWS[1], "error": "out of memory"}]}
    first, _, _, _, tests, measured, failed = table(report).splitlines()
    assert first == "Some GPU, torch 2; a large matrix product runs at 8 TFLOP/s."
    assert tests.endswith("| 14 passed in 60 s |") and failed.endswith("| out of memory |")
    assert measured == "| sd15 | balanced | 4 | 1 | 2 | 3.00 | 2.00 (+50.0%) | 2 (25%) |  |"


def test_an_error_in_a_row_is_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "run_tests", lambda *_: {**TESTS, "result": "3 passed", "wall_seconds": 1.0})
    monkeypatch.setattr(check_gpu, "measure", lambda row, *_: {**row, "wall_seconds": 1.0, "error": "out of memory"})
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--tiny", f"--json={tmp_path / 'out.json'}"])
    with pytest.raises(SystemExit, match="some rows failed"):
        check_gpu.main()
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", f"--table={tmp_path / 'out.json'}"])
    check_gpu.main()
    assert capsys.readouterr().out.count("| tiny int8 products | streaming | 1 | 2 |  |  |  |  | out of memory |") == 2


def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "scripts/check_gpu.py"], cwd=check_gpu.ROOT, capture_output=True, text=True,
        env=environment_of(None, Path()) | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == (
        "error: there is no GPU here that torch can use; --tiny tries the command without one\n"
    )


def test_a_row_is_measured_and_forecast_on_the_cpu(tmp_path):
    row = check_gpu.measure(check_gpu.TINY[0], 300.0, environment_of(None, tmp_path), tiny=True)
    assert "error" not in row and row["seconds"][0] > 0 and row["forecast"]["peak"] > 2**20
    assert row["facts"]["device"] == "CPU" and cells(row)[4] and "%" in cells(row)[7]
