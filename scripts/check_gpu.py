"""Tells in a few minutes whether this project works on a GPU, how fast it is, and how much memory it takes.

    python scripts/check_gpu.py                          writes check_gpu.json after every row, prints a table
    python scripts/check_gpu.py --minutes 8              begins no row that probably does not end in time
    python scripts/check_gpu.py --wheels wheels/         if diffusers or ml_collections is not installed, but is in
                                                         that folder as a wheel
    python scripts/check_gpu.py --table check_gpu.json   the table of an earlier run, finished or not; needs no GPU
    python scripts/check_gpu.py --tiny                   tries the command itself, without a GPU, on the bundled model

The first row runs the tests that need CUDA (tests/gpu). Each other row measures AlignPropTrainer's own optimizer step
on random weights of full size (scripts/bench/gpu.py says how). Each row runs in its own process: an error in one row is
written into that row and does not affect the others. While a row is measured, another process makes its forecast on
the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"name": "tests"}
# The rows that tell most come first. `limit_gib` is the most GPU memory that a row may take.
ROWS = [
    {"model": "sd15", "policy": "balanced", "chunk": 4, "active": 1},
    {"model": "sdxl", "policy": "balanced", "chunk": 1, "active": 1},
    {"model": "sd15", "policy": "balanced", "chunk": 4, "active": 50},
    {"model": "sd15", "policy": "smallest", "chunk": 1, "active": 50, "limit_gib": 4.0},
    {"model": "flux", "policy": "balanced", "chunk": 1, "active": 1, "steps": 10, "quantize": "int8"},
    {"model": "flux", "policy": "streaming", "chunk": 1, "active": 1, "steps": 10, "quantize": "int4"},
    {"model": "flux", "policy": "balanced", "chunk": 1, "active": 1, "steps": 10, "quantize": "fp8", "products": True},
    {"model": "flux", "policy": "smallest", "chunk": 1, "active": 1, "steps": 10, "quantize": "nf4"},
    {"model": "sdxl", "policy": "lean", "chunk": 1, "active": 1},
    {"model": "sdxl", "policy": "balanced", "chunk": 1, "active": 50},
    {"model": "sd15", "policy": "lean", "chunk": 4, "active": 1},
    {"model": "sd15", "policy": "lean", "chunk": 4, "active": 50},
    {"model": "sdxl", "policy": "lean", "chunk": 1, "active": 50},
]
TINY = [
    {"model": "tiny", "policy": "balanced", "chunk": 1, "active": 2, "steps": 2},
    {"model": "tiny", "policy": "streaming", "chunk": 1, "active": 2, "steps": 2, "quantize": "int8", "products": True},
]
START = 60.0  # the expected seconds of a row, until a row of the same model has been measured


def main() -> None:
    options = parse()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_of(options.wheels, Path(folder))
        if not options.tiny and not has_gpu(environment):
            sys.exit("error: there is no GPU here that torch can use; --tiny tries the command without one")
        report = check(options, environment)
    print(table(report))
    if any("error" in row for row in report["rows"]):
        sys.exit("error: some rows failed; the table names them, and the JSON file has all that they printed")


def check(options: argparse.Namespace, environment: dict[str, str]) -> dict:
    """Makes rows until the time is over, and writes the report after each row."""
    ends = time.monotonic() + 60 * options.minutes
    report: dict = {"rows": []}
    for row in [TESTS, *(TINY if options.tiny else ROWS)]:
        left = ends - time.monotonic()
        if left < expected_seconds(row, report["rows"]):
            report["rows"].append({**row, "skipped": f"no time: {max(left, 0):.0f} s were left"})
        elif row == TESTS:
            report["rows"].append(run_tests(left, environment, options.tiny))
        else:
            report["rows"].append(measure(row, left, environment, options.tiny))
        print(summary(report["rows"][-1]), flush=True)
        write(report, options.json)
    return report


def expected_seconds(row: dict, before: list[dict]) -> float:
    """Estimates a row's seconds from the longest row of the same model so far.

    The estimate is 1.5 times as long if one of those rows had fewer active steps, because gradient through all steps
    takes up to three times as long.
    """
    same = [other for other in before if other.get("model") == row.get("model") and "wall_seconds" in other]
    if not same or row == TESTS:
        return START
    longer = any(other["active"] < row["active"] for other in same)
    return max(other["wall_seconds"] for other in same) * (1.5 if longer else 1.0)


def run_tests(seconds: float, environment: dict[str, str], tiny: bool) -> dict:
    """Runs the tests that need CUDA. With `--tiny` their bodies run on the CPU, as far as they can."""
    environment = environment | ({"ALIGNPROP_GPU_TESTS_ON": "cpu"} if tiny else {})
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    started = time.monotonic()
    code, output = run(command, environment, min(seconds, 240))
    lines = [line for line in output.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    row = {**TESTS, "wall_seconds": time.monotonic() - started, "result": lines[-1].strip("= ") if lines else ""}
    return row if code == 0 else {**row, "error": "; ".join(failed) or f"exit status {code}", "output": output[-20000:]}


def measure(row: dict, seconds: float, environment: dict[str, str], tiny: bool) -> dict:
    """Returns the row with what was measured and what was forecast, and with an "error" if its process failed."""
    started, device = time.monotonic(), "cpu" if tiny else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        out, forecast = Path(folder) / "measured.json", Path(folder) / "forecast.json"
        script = [sys.executable, "scripts/bench/gpu.py", "--device", device, "--repeats", "2", *flags(row)]
        with open(Path(folder) / "forecast.log", "w") as log:
            # The forecast runs on the CPU, so that it costs no GPU time.
            forecasting = subprocess.Popen(
                [*script, "--forecast", str(forecast)], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            try:
                code, output = run([*script, "--json", str(out), "--no_table"], environment, seconds)
                if out.exists():  # otherwise the row's process died, and there is nothing to compare with
                    forecasting.wait(timeout=max(1.0, seconds - (time.monotonic() - started)))
            except subprocess.TimeoutExpired:
                pass
            finally:
                forecasting.kill()
                forecasting.wait()
        row = {**row, "wall_seconds": time.monotonic() - started}
        measured = json.loads(out.read_text()) if out.exists() else {"rows": [{}], "facts": {}}
        planned = json.loads(forecast.read_text())[0] if forecast.exists() else {}
    row |= {"facts": measured["facts"], "forecast": planned, **measured["rows"][0]}
    if code and "error" not in row:
        reasons = [line for line in output.splitlines() if line.strip()] or [f"exit status {code}"]
        row |= {"error": reasons[-1], "output": output[-20000:]}
    return row


def run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Returns the exit status (124 if it took longer) and the output of a process that may take so many seconds."""
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # The output is unbuffered, so that its last line is the one that was printed last.
        environment = environment | {"PYTHONUNBUFFERED": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, **streams)
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        return 124, f"{output}\nended after {seconds:.0f} s"


def flags(row: dict) -> list[str]:
    named = {"--models": "model", "--policies": "policy", "--chunks": "chunk", "--active": "active", "--steps": "steps"}
    named |= {"--limit_gib": "limit_gib", "--quantize": "quantize"}
    values = [f"{flag}={row[name]}" for flag, name in named.items() if name in row]
    return ["--variants=", *values, *(["--products"] if row.get("products") else [])]


def environment_of(wheels: Path | None, folder: Path) -> dict[str, str]:
    """Returns the environment of the rows' processes, which import the packages in `wheels` before installed ones.

    Args:
        folder: An empty folder, into which the wheels are unpacked.

    Raises:
        SystemExit: There is no wheel in `wheels`.
    """
    if wheels is None:
        return dict(os.environ)
    files = sorted(wheels.glob("*.whl"))
    if not files:
        sys.exit(f"error: --wheels = {str(wheels)!r} holds no .whl file")
    for file in files:
        with zipfile.ZipFile(file) as archive:  # a wheel of pure Python is a folder of packages
            archive.extractall(folder)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def has_gpu(environment: dict[str, str]) -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL).returncode == 0


def write(report: dict, path: Path) -> None:
    """Writes the report whole or not at all, because a run may be cut short at any moment."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, path)


# ---- results


def table(report: dict) -> str:
    """Returns Markdown: the device, and a table with a line for each row."""
    facts = next((row["facts"] for row in report["rows"] if row.get("facts")), {})
    lines = []
    if facts:
        pace = facts["flops_per_second"] / 1e12
        lines.append(f"{facts['device']}, torch {facts['torch']}; a large matrix product runs at {pace:.4g} TFLOP/s.\n")
    header = ["model", "policy", "samples", "K", "s/sample", "peak GiB", "forecast", "TFLOP/s (share)", "remark"]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in report["rows"]]
    return "\n".join(lines)


def cells(row: dict) -> list[str]:
    if "name" in row:
        return ["tests of CUDA", *[""] * 7, row.get("error") or row.get("skipped") or row["result"]]
    remark = row.get("error") or row.get("skipped") or ""
    limit = f"held to {row['limit_gib']:g} GiB" if "limit_gib" in row else ""
    model = " ".join([row["model"], *filter(None, [row.get("quantize"), row.get("products") and "products"])])
    case = [model, row["policy"], str(row["chunk"]), str(row["active"])]
    measured = ["", "", "", ""]
    planned = row.get("forecast") or {}
    if planned:
        measured[2] = f"{planned['peak'] / 2**30:.2f}"
    if row.get("seconds"):
        seconds = sorted(row["seconds"])[len(row["seconds"]) // 2] / row["chunk"]
        measured[0] = f"{seconds:.3g}"
        if planned:
            pace = planned["flops"] / seconds
            measured[3] = f"{pace / 1e12:.3g} ({pace / row['facts']['flops_per_second']:.0%})"
    if "peak" in row:
        measured[1] = f"{row['peak'] / 2**30:.2f}"
        if planned:
            measured[2] += f" ({row['peak'] / planned['peak'] - 1:+.1%})"
    return [*case, *measured, "; ".join(filter(None, [limit, remark]))]


def summary(row: dict) -> str:
    return "  ".join(filter(None, cells(row)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for all rows; default 8")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of pure Python, imported first")
    parser.add_argument("--json", type=Path, default=Path("check_gpu.json"), help="default check_gpu.json")
    parser.add_argument("--table", type=Path, help="print the table of this JSON file")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with the bundled model")
    options = parser.parse_args()
    if options.wheels and not options.wheels.is_dir():
        parser.error(f"--wheels = {str(options.wheels)!r} is no folder")
    return options


if __name__ == "__main__":
    main()
