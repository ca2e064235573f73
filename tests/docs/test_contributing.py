"""CONTRIBUTING.md: each of its examples is applied to a copy of the repository, and used there."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TINY = (
    "--config=config/align_prop.py:quickstart", "--config.num_epochs=1", "--config.num_inference_steps=4",
    "--config.num_eval_images=2", "--config.train.total_batch_size=2", "--config.train.total_samples_per_epoch=2",
    "--config.eval_reward_fn=", "--config.run_name=r",
)  # fmt: skip
AURA_FLOW = """
import torch
from scripts.bench import families
from tests.helpers.tiny_families import FLOW, T5, TINY, VAE
from tests.helpers.tiny_pipelines import make_family

TINY["aura_flow"] = {
    "family": "aura_flow",
    "denoiser": {
        "_class_name": "AuraFlowTransformer2DModel", "sample_size": 8, "num_mmdit_layers": 1,
        "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
        "caption_projection_dim": 16,
    },
    "vae": VAE, "text_encoders": [T5], "scheduler": FLOW,
}
folder = make_family("model", "aura_flow")
model, pipeline = families.load("aura_flow", folder), families.plain_pipeline("aura_flow", folder)
for guidance in (1.0, 4.0):
    found = families.our_pictures(model, guidance)
    expected = families.pipeline_pictures("aura_flow", pipeline, guidance, height=16, width=16)
    assert found.std() > 0.02
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    sweep, autograd = families.gradients("aura_flow", folder, guidance)
    assert (sweep - autograd).norm() < 1e-5 * autograd.norm() and autograd.norm() > 0
"""


def section(title: str) -> list[str]:
    """Its Python."""
    text = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def copy(tmp_path):
    """The repository as somebody has cloned it."""
    for name in ("alignprop", "config", "rewards", "scripts", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def call(folder, *words):
    return warm.call(*words, cwd=folder, environment={"PYTHONPATH": str(folder)})


def put(path, text, before):
    """Text into a file, before some other."""
    content = path.read_text(encoding="utf-8")
    assert before in content
    path.write_text(content.replace(before, text + before, 1), encoding="utf-8")


def test_an_estimator(copy):
    code, test = section("Add an estimator")
    file = copy / "alignprop" / "method" / "estimators.py"
    put(file, code + "\n\n", "ESTIMATORS = {")
    put(file, "        every_second,\n", "    )\n}\n")
    checked = call(copy, "-m", "ruff", "check", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    done = call(copy, "main.py", *TINY, "--config.estimator=every_second")
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((copy / "logs" / "r").glob("checkpoints/checkpoint_1/*.safetensors"))
    with (copy / "tests" / "unit" / "test_estimators.py").open("a") as file:
        file.write("\n\n" + textwrap.dedent(test))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/unit/test_estimators.py", "-k", "every_second"]
    tested = subprocess.run(command, cwd=copy, capture_output=True, text=True)  # a new process imports the copy's tests
    assert tested.returncode == 0 and "1 passed" in tested.stdout, tested.stdout


def test_a_reward(copy):
    code, line = section("Add a reward")
    (copy / "rewards" / "sharpness.py").write_text(code)
    put(copy / "rewards" / "registry.py", line, '    "aesthetic": Entry')
    assert call(copy, "scripts/config_docs.py").returncode == 0
    assert "`sharpness.distance`" in (copy / "docs" / "config.md").read_text(encoding="utf-8")
    done = call(copy, "main.py", *TINY, "--config.reward_fn=sharpness", "--config.sharpness.distance=2")
    assert done.returncode == 0, done.stderr[-2000:]
    refused = call(copy, "main.py", *TINY, "--config.reward_fn=sharpness", "--config.sharpness.distance=17")
    assert refused.returncode == 1 and "sharpness.distance = 17 must be" in refused.stderr


def test_a_model(copy):
    code, line = section("Add a model")
    (copy / "alignprop" / "models" / "aura_flow.py").write_text(code)
    put(copy / "alignprop" / "models" / "__init__.py", line, '    "sd": Family')
    done = call(copy, "-c", AURA_FLOW)
    assert done.returncode == 0, done.stderr[-3000:]
