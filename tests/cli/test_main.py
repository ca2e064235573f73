"""The command line, as a person uses it: one process, and two."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[2]


def run_main(*arguments, processes=1, environment=()):
    """main.py as a person starts it, all imports included, which take most of the time of a small run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", **dict(environment)
    }  # fmt: skip
    command = [sys.executable, *(launcher if processes > 1 else []), "main.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def flags(config, preset="quickstart"):
    """The command-line flags that turn a preset into `config`."""
    from alignprop.settings.resolve import flatten
    from config.align_prop import get_config

    theirs, ours = flatten(get_config(preset).to_dict()), flatten(config.to_dict())
    changed = {k: v for k, v in ours.items() if v != theirs[k]}
    return [f"--config=config/align_prop.py:{preset}", *(f"--config.{k}={v}" for k, v in changed.items())]


def test_a_run_ends_with_what_it_reached_and_where_that_lies(toy_config):
    done = warm.call("main.py", *flags(toy_config(run_name="r", num_epochs=1)))
    assert done.returncode == 0, done.stderr
    assert "held-out rewards, step 0 → step 2" in done.stdout and "before_after.png" in done.stdout


def test_a_process_that_ends_with_an_error_does_what_was_submitted():
    program = (
        "import time; from alignprop.engine.background import Background\n"
        "background = Background()\n"
        "for n in range(3): background.submit(lambda n=n: (time.sleep(0.02), print(n, flush=True)))\n"
        "raise RuntimeError('elsewhere')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "elsewhere" in done.stderr
    assert done.stdout.split() == ["0", "1", "2"]


def test_without_the_packages_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-S", "main.py"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith("error: the package 'absl' is not installed; activate") and done.stderr.count("\n") == 1
    )


def test_what_finds_mistakes_loads_no_torch():
    settings = sorted((ROOT / "alignprop" / "settings").rglob("*.py"))
    modules = ["main", "alignprop.command", "rewards", "rewards.errors", "rewards.registry"]
    modules += ["config.align_prop", "config.ddpo"]
    modules += [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in settings]
    code = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
