"""The device of the tests that need a GPU."""

import os
from pathlib import Path

import pytest
import torch

ON_CPU = os.environ.get("ALIGNPROP_GPU_TESTS_ON") == "cpu"


def pytest_collection_modifyitems(items):
    """Those of this folder, which alone are marked, are skipped where there is no GPU."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not ON_CPU:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))


@pytest.fixture
def device(monkeypatch):
    """CUDA; or the CPU, to try the tests themselves."""
    kind = "cpu" if ON_CPU else "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true" if ON_CPU else "false")
    if not ON_CPU:
        torch.cuda.empty_cache()
    yield torch.device(kind)
    if not ON_CPU:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture
def toy_config(toy_config):
    """With a step more and all that an evaluation measures: a GPU has time for both."""
    return lambda *preset, **fields: toy_config(
        *preset, **{"num_inference_steps": 3, "eval_base_distance": True} | fields
    )
