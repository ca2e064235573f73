"""Kills a training run again and again, resumes it each time, and compares its end with an undisturbed run's.

    .venv/bin/python -m tests.helpers.faults                  30 kills, some minutes on two cores

Half of the kills (SIGKILL) hit the run while it writes a checkpoint, half at any moment; between them it is sometimes
asked to stop (SIGTERM). Always the same command starts it again. Exit status 1 where anything differs at the end.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from alignprop.engine.stopping import STOPPED  # noqa: E402
from alignprop.runs.checkpoint import checkpoints_of, read_state  # noqa: E402
from alignprop.runs.manifest import damage_of  # noqa: E402

# Like the quickstart, but with short steps, so that there is much to interrupt.
FIELDS = {
    "num_epochs": 30, "eval_freq": 2, "num_checkpoint_limit": 3, "num_inference_steps": 4, "eta": 1.0,
    "per_gpu_capacity": 2, "num_eval_images": 4, "max_vis_images": 4, "train.total_batch_size": 4,
    "train.total_samples_per_epoch": 8, "train.ema_decay": 0.9, "resume_from": "latest",
}  # fmt: skip
WAYS = {"killed while saving": 3, "killed at any moment": 3, "asked to stop": 1}  # and how often, relatively
LONGEST_SAVE = 0.03  # seconds


def start(run: Path) -> subprocess.Popen:
    fields = {**FIELDS, "log_dir": run.parent, "run_name": run.name}
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    command = [sys.executable, "main.py", "--config=config/align_prop.py:quickstart", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(run.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(process: subprocess.Popen, condition, seconds: float = 600) -> None:
    """Until the condition holds, the process has ended, or the time is over."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition() and time.monotonic() < end:
        time.sleep(0.0005)


def disturb(process: subprocess.Popen, run: Path, way: str, lifetime: float, rng: random.Random) -> None:
    """Waits for the moment and sends the signal, unless the process has ended before."""
    saving = lambda: any(run.glob("checkpoints/writing_*"))  # noqa: E731
    if way == "killed while saving":
        for _ in range(rng.randint(0, 3)):  # saves that are let pass
            wait_for(process, saving)
            wait_for(process, lambda: not saving())
        wait_for(process, saving)
        time.sleep(rng.uniform(0, LONGEST_SAVE))
    else:
        wait_for(process, lambda: False, rng.uniform(0, lifetime))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM if way == "asked to stop" else signal.SIGKILL)
    process.wait(timeout=60)


def flat(value, name="") -> dict:
    """Nested dicts and lists as {path: leaf}, tensors as bytes."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def contents(run: Path) -> dict:
    """Everything that a run left, but for where it lies and how long its steps took."""
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found |= flat([{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in rows], name)
        elif path.name == "training_state.pt":
            state = read_state(path.parent)
            found |= flat({k: v for k, v in state.items() if k != "config"}, name)
        elif path.name == "report.html":
            own = r"<title>.*?</title>|<h1>.*?</h1>|<tr><td>command</td>.*?</tr>"  # the run's name and its command
            found[name] = re.sub(own, "", path.read_text(encoding="utf-8"))
        elif path.name not in ("config.json", "manifest.json"):
            found[name] = path.read_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; a new one each time by default")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    rng, counts, began = random.Random(seed), Counter(), time.monotonic()
    logs = Path(tempfile.mkdtemp(prefix="faults_"))
    print(f"moments drawn with --seed={seed}; logs in {logs}")

    whole = logs / "undisturbed"
    if start(whole).wait() != 0:
        sys.exit(f"the undisturbed run failed: {whole.with_suffix('.log')}")
    expected, lifetime, differences = contents(whole), (time.monotonic() - began) / 2, []
    with tqdm(total=options.kills, desc="kills") as progress:
        while counts["kills"] < options.kills:
            counts["runs"] += 1
            run = logs / f"disturbed_{counts['runs']}"
            differences += live(run, options.kills, lifetime, rng, counts, progress)
            found = contents(run)
            differences += [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    first = ("kills", "kills inside a save", "resumes", "checkpoints found damaged")
    for name in dict.fromkeys([*first, *sorted(counts)]):
        print(f"{name:40s} {counts[name]:4d}")
    print(f"{'differences':40s} {len(differences):4d}  (of {len(expected)} values and files)")
    print(f"{'minutes':40s} {(time.monotonic() - began) / 60:6.1f}")
    if differences:
        sys.exit("\n".join(sorted(differences)[:20]))
    shutil.rmtree(logs)


def live(run: Path, kills: int, lifetime: float, rng: random.Random, counts: Counter, progress: tqdm) -> list[str]:
    """Starts a run until it has finished, disturbing it while there are kills left; what else went wrong."""
    while True:
        process = start(run)
        if counts["kills"] < kills:
            way = rng.choices(list(WAYS), list(WAYS.values()))[0]
            disturb(process, run, way, lifetime, rng)
        code = process.wait()
        if code == 0:
            return []
        counts["resumes"] += 1
        counts["checkpoints found damaged"] += sum(bool(damage_of(path)) for path in checkpoints_of(run))
        if code == -signal.SIGKILL:
            counts["kills"] += 1
            counts["kills inside a save"] += any(run.glob("checkpoints/writing_*"))
            progress.update()
        elif code in (STOPPED, -signal.SIGTERM):  # the latter before training began
            counts[f"asked to stop, exit status {code}"] += 1
        else:
            return [f"exit status {code}: see {run.with_suffix('.log')}"]


if __name__ == "__main__":
    main()
