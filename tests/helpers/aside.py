"""Packages that tests compare with and that must not lie beside ours: installed aside, run in their own process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import torch

ROOT = Path(__file__).resolve().parents[2]


def install(name: str, command: list[str], recipe: str) -> Path:
    """The git-ignored folder `work/<name>`, made by `command`, which ends in it, unless it was made by this recipe."""
    target = ROOT / "work" / name
    target.parent.mkdir(exist_ok=True)
    stamp = target / "installed.txt"
    with filelock.FileLock(f"{target}.lock"):
        if not stamp.is_file() or stamp.read_text() != recipe:
            shutil.rmtree(target, ignore_errors=True)
            run([*command, str(target)], os.environ | {"PYTHON": sys.executable})
            stamp.write_text(recipe)
    return target


def install_hps() -> Path:
    script = ROOT / "scripts" / "install_hps.sh"
    recipe = script.read_text() + (ROOT / "requirements-hps.txt").read_text()
    return install("hpsv2_reference", ["bash", str(script), "--target"], recipe)


def install_pinned(name: str, requirements: tuple[str, ...]) -> Path:
    """These packages, without what they ask for: it is in the environment, or not needed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *requirements, "--target"]
    return install(name, command, "\n".join(requirements))


def ask(module: str, packages: Path, folder: Path):
    """`python -m <module> PACKAGES FOLDER`, on the CPU and offline; what it leaves in FOLDER/answers.pt."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run([sys.executable, "-m", module, str(packages), str(folder)], environment)
    return torch.load(folder / "answers.pt")


def run(command, environment):
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def load_torchvision():
    """torchvision, also where its compiled operators do not load: nothing here uses them, but it registers them."""
    try:
        import torchvision
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.operators_without_kernels = library  # it must live as long as the process
    return torchvision
