"""The command line, as a person uses it: one process, and two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignprop.lora import LORA_FILE

ROOT = Path(__file__).resolve().parent.parent


def run_main(*arguments, processes=1, environment=()):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", **dict(environment)
    }  # fmt: skip
    command = [sys.executable, *launcher, "main.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def flags(config, preset="quickstart"):
    """The command-line flags that turn a preset into `config`."""
    from alignprop.settings import flatten
    from config.align_prop import get_config

    theirs, ours = flatten(get_config(preset).to_dict()), flatten(config.to_dict())
    changed = {k: v for k, v in ours.items() if v != theirs[k]}
    return [f"--config=config/align_prop.py:{preset}", *(f"--config.{k}={v}" for k, v in changed.items())]


def test_one_and_two_processes_train_and_evaluate_alike(toy_config, tmp_path):
    results = []
    for processes in (1, 2):
        name = f"p{processes}"
        done = run_main(*flags(toy_config(run_name=name)), processes=processes)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "logs" / name
        config = json.loads((folder / "config.json").read_text())
        assert config["train"]["gradient_accumulation_steps"] == 2 // processes
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results.append((load_file(folder / "checkpoints" / "checkpoint_4" / LORA_FILE), rows, done.stdout))
    (one, rows_1, out), (two, rows_2, _) = results
    vectors = [torch.cat([w[name].flatten() for name in sorted(w)]) for w in (one, two)]
    assert (vectors[0] - vectors[1]).norm() <= 1e-5 * vectors[0].norm()
    assert len(rows_1) == len(rows_2)
    for a, b in zip(rows_1, rows_2, strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5)
    assert "held-out rewards, step 0 → step 4" in out and "before_after.png" in out
