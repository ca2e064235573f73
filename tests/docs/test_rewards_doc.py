"""docs/rewards.md against the rewards that there are, and its example against what is asked of a reward."""

import re
import sys
from pathlib import Path

import pytest
import torch

from rewards import REWARDS, build_reward, reward_class

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading row that starts so."""
    lines = TEXT[TEXT.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_reward_is_in_the_table():
    named = {re.findall(r"`(\w+)`", row[0])[0]: row for row in rows("name")}
    assert named.keys() == REWARDS.keys()
    for name, row in named.items():
        assert row[4].startswith("yes" if reward_class(name).differentiable else "no"), name


@pytest.fixture
def example(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_rewards", None)


def test_the_example_is_a_reward(example):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for name in ("warmth", "Contrast"):
        scores = build_reward(f"my_rewards:{name}")(images, ["a", "b"])
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert scores.shape == (2,) and gradient.flatten(1).norm(dim=1).min() > 0
    bright = build_reward("my_rewards:bright_pixels")
    assert not bright.differentiable and bright(images, ["a", "b"]).tolist() == pytest.approx([0.5, 0.5], abs=0.3)
