"""Compares time and memory of an optimizer step with TRL 0.23.1's AlignPropTrainer: some minutes on a CPU.

    python scripts/bench/step_time.py                   10 pairs of steps in each case, prints a table
    python scripts/bench/step_time.py --json out.json   also writes every measurement

The first call makes a virtual environment for TRL, in work/step_time. Then, for each case, two processes make optimizer
steps in turn, each on one thread and in float32. Both train the same Stable Diffusion with random weights (3.15 M
parameters in the UNet, 16×16 latents, 32×32 pictures), from the same LoRA and noise, with the same reward, sampler,
batch and optimizer. Neither logs, evaluates or saves. Both call the network for the two branches of guidance at once,
and both keep the attention that diffusers chooses. Everything else that makes a step fast is at each side's defaults:
ours lays convolutions out in NHWC order on a CPU and has memory policies; TRL recomputes every network call in the
backward pass.

The table has the median seconds of a step, and the ratio of ours to TRL's: of the medians, and in brackets the least
and the greatest of the pairs. It has the same ratio in processor seconds, which other processes on the machine disturb
less. Memory is the most that a process has held, with its libraries: before its first step, and at the end. The reward
is that of the pictures that training drew, in the first and in the second half of the steps. It differs only by
rounding, because the maths are the same.
"""

import argparse
import io
import json
import math
import shutil
import statistics
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from scripts.bench.worker import PACKAGES, Worker, WorkerError  # noqa: E402
from tests.helpers.single_file import make_pipeline  # noqa: E402

CACHE = ROOT / "work" / "step_time"
TRL = "trl==0.23.1"
NUM_STEPS = 10
PROBLEM = {
    "pipeline": str(CACHE / "pipeline"),
    "prompt": "a photo of a cat",
    "prompt_file": str(CACHE / "prompts.txt"),
    "log_dir": str(CACHE / "logs"),
    "num_steps": NUM_STEPS,
    "guidance_scale": 5.0,
    "eta": 0.0,  # with 0, neither side draws noise during sampling
    "batch_size": 4,
    "lora_rank": 4,  # TRL has no other rank, and no other layers than to_q, to_k, to_v and to_out.0
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Case:
    """What a pair of workers does.

    Attributes:
        name: The name in the table.
        first_step: Sampler steps from this one on carry gradient.
        overrides: Further fields of our configuration.
    """

    name: str
    first_step: int
    overrides: dict = field(default_factory=dict)


CASES = (
    Case("K = 1", NUM_STEPS - 1),
    Case(f"K = {NUM_STEPS}, all steps", 0),
    Case("all steps, graphs kept", 0, {"memory.keep_steps": NUM_STEPS}),
)


# ---- set-up


def trl_python(folder: Path, install=subprocess.run) -> Path:
    """Returns the interpreter of a virtual environment with TRL and otherwise our versions. Makes it if it is missing.

    Raises:
        SystemExit: It could not be made. The message has the output of the command that failed.
    """
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = f"{TRL}\n{(ROOT / 'requirements.txt').read_text()}"
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"Making a virtual environment for {TRL} in {folder}, once: some minutes.", flush=True)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", folder],
        [*pip, TRL, *PACKAGES, "--constraint", ROOT / "requirements.txt"],
    ):
        result = install([str(word) for word in command], capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"error: {' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    done.write_text(wanted)
    return python


def make_problem() -> None:
    """Writes the pipeline and the prompts that both sides work on."""
    folder = Path(PROBLEM["pipeline"])
    shutil.rmtree(folder, ignore_errors=True)
    sizes = dict(channels=(64, 128), layers_per_block=1, sample_size=16, vae_channels=(32, 64), text_width=64)
    with redirect_stderr(io.StringIO()):  # hides the progress of a second's work, and notes on missing packages
        make_pipeline(folder, **sizes)
    Path(PROBLEM["prompt_file"]).write_text(PROBLEM["prompt"])


# ---- measuring


def measure(case: Case, pairs: int, python: Path) -> dict:
    """Makes steps of both sides in turn. The first pair is for warming up.

    Returns:
        {"trl": side, "ours": side}. A side has its worker's facts and "steps", which are `pairs` + 1 of its answers.

    Raises:
        WorkerError: A side failed, or the two are not alike.
    """
    common = {"problem": PROBLEM, "first_step": case.first_step}
    with (
        Worker(python, "scripts.bench.trl_worker", common) as trl,
        Worker(sys.executable, "scripts.bench.ours_worker", {**common, "overrides": case.overrides}) as ours,
    ):
        workers = {"trl": trl, "ours": ours}
        sides = {name: {**worker.facts, "steps": []} for name, worker in workers.items()}
        for pair in tqdm(range(pairs + 1), desc=case.name, leave=False, disable=None):
            for name in sorted(workers, reverse=bool(pair % 2)):  # so that neither is always the first
                sides[name]["steps"].append(workers[name].step())
            if not pair:
                check_alike(sides)
    return sides


def check_alike(sides: dict) -> None:
    """Checks that both sides train as many weights of the same model, with the same packages, on the same pictures.

    Raises:
        WorkerError: They do not.
    """
    trl, ours = sides["trl"], sides["ours"]
    for fact in ("parameters", "trained", "versions"):
        if trl[fact] != ours[fact]:
            raise WorkerError(f"{fact} differ: {trl[fact]} in TRL's worker, {ours[fact]} in ours")
    first = [side["steps"][0]["reward"] for side in (trl, ours)]
    if not math.isclose(*first, rel_tol=1e-3):
        raise WorkerError("rewards before the first update differ: {} in TRL's worker, {} in ours".format(*first))


# ---- results


def summary(sides: dict) -> dict:
    """Returns the figures of a case: wall-clock and processor seconds compared; MiB and rewards of each side."""
    return {
        "seconds": compare(sides, "seconds"),
        "cpu_seconds": compare(sides, "cpu_seconds"),
        "mib": {name: [side["peak_mib"], side["steps"][-1]["peak_mib"]] for name, side in sides.items()},
        "rewards": {name: halves([step["reward"] for step in side["steps"]]) for name, side in sides.items()},
    }


def compare(sides: dict, quantity: str) -> dict:
    """Returns both sides' medians, without the first step, and the ratio of ours to TRL's with [least, greatest]."""
    values = {name: [step[quantity] for step in side["steps"][1:]] for name, side in sides.items()}
    medians = {name: statistics.median(numbers) for name, numbers in values.items()}
    ratios = [ours / trl for ours, trl in zip(values["ours"], values["trl"], strict=True)]
    return {**medians, "ratio": medians["ours"] / medians["trl"], "range": [min(ratios), max(ratios)]}


def halves(values: list[float]) -> list[float]:
    """Returns the means of the first and of the second half. A middle value counts in both."""
    half = (len(values) + 1) // 2
    return [statistics.mean(values[:half]), statistics.mean(values[-half:])]


def table(results: dict[str, dict]) -> str:
    """Returns a Markdown table of {case: summary}."""
    rows = [["case", "TRL s", "ours s", "ratio", "CPU ratio", "TRL MiB", "ours MiB", "TRL reward", "ours reward"]]
    for name, s in results.items():
        row = [name, *(f"{s['seconds'][side]:.3f}" for side in ("trl", "ours"))]
        for times in (s["seconds"], s["cpu_seconds"]):
            row.append("{:.3f} ({:.2f} … {:.2f})".format(times["ratio"], *times["range"]))
        row += ["{:.0f} → {:.0f}".format(*s["mib"][side]) for side in ("trl", "ours")]
        row += ["{:+.4f} → {:+.4f}".format(*s["rewards"][side]) for side in ("trl", "ours")]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="steps of each side in each case, 5 or more; default 10")
    parser.add_argument("--json", type=Path, help="file for every measurement")
    options = parser.parse_args()
    if options.pairs < 5:
        parser.error(f"--pairs = {options.pairs} must be 5 or more: fewer say nothing on a shared machine")
    python = trl_python(CACHE / "trl_venv")
    make_problem()
    try:
        sides = {case.name: measure(case, options.pairs, python) for case in CASES}
    except WorkerError as error:
        sys.exit(f"error: {error}")
    results = {name: summary(measured) for name, measured in sides.items()}
    print(table(results))
    facts = sides[CASES[0].name]
    print(f"\n{TRL}; both: " + ", ".join(f"{name} {v}" for name, v in facts["ours"]["versions"].items()))
    print(f"attention: TRL {facts['trl']['attention']}, ours {facts['ours']['attention']}")
    print(f"trained: {facts['ours']['trained']:,} of {facts['ours']['parameters']:,} parameters")
    if options.json:
        cases = {case.name: {**asdict(case), "summary": results[case.name], **sides[case.name]} for case in CASES}
        options.json.write_text(json.dumps({"trl": TRL, "problem": PROBLEM, "cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
