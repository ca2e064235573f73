"""Shared fixtures: a random-weight Stable Diffusion in its folder."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.exhaustive import mark_exhaustive, stale
from tests.helpers.drawing import BlankFigure
from tests.helpers.single_file import make_pipeline

torch.set_num_threads(1)


def pytest_collection_modifyitems(session, config, items):
    narrowed = any(config.getoption(name, None) for name in ("lf", "ignore", "ignore_glob", "deselect"))
    whole = config.args == config.getini("testpaths") and not narrowed and not session.testsfailed
    if whole and (lost := stale(items)):
        raise pytest.UsageError(f"tests/exhaustive.py names tests that are not there: {lost}")
    mark_exhaustive(items)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """{"epsilon": folder, "v_prediction": folder}."""
    root = tmp_path_factory.mktemp("pipelines")
    small = dict(channels=(16,), layers_per_block=1, vae_channels=(8, 16), text_width=16)
    return {kind: make_pipeline(root / kind, kind, **small) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(scope="session")
def pipeline_folder(pipelines):
    return pipelines["epsilon"]


@pytest.fixture(scope="session")
def deeper_pipeline(tmp_path_factory):
    """The folder of one with two levels, where the smallest one does not show what is tested."""
    folder = tmp_path_factory.mktemp("deeper") / "pipeline"
    return str(make_pipeline(folder, channels=(16, 32), layers_per_block=1, vae_channels=(8, 16), text_width=16))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one precision for a whole process."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, even in tests that a script started in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def offline(monkeypatch):
    """Nothing may reach for the hub; transformers and huggingface_hub fail at once instead."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def without_rounding(monkeypatch):
    """Resized pictures are not rounded to 8 bits, so that a difference quotient shows the gradient."""
    monkeypatch.setattr("rewards.preprocess.round_to_8_bits", lambda images: images)


@pytest.fixture
def plots():
    """A test that asks for this one has its curves drawn."""


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Drawing curves takes longer than the toy runs, so that others get blank pictures."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure", BlankFigure)


@pytest.fixture
def toy_config(pipeline_folder, tmp_path):
    """The quickstart preset on a random-weight model, a toy reward and few, small steps; fields as keywords."""
    from config.align_prop import get_config

    def make(preset="quickstart", **overrides):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a cat\na dog\ntwo red circles\na blue bird\n")
        c = get_config(preset)
        defaults = {
            "pretrained.model": str(pipeline_folder),
            "reward_fn": "tests.helpers.toy_rewards:redness",
            "eval_reward_fn": "tests.helpers.toy_rewards:contrast",
            "prompt_fn": str(prompts),
            "eval_prompt_fn": str(prompts),
            "log_dir": str(tmp_path / "logs"),
            "mixed_precision": "no",
            "num_inference_steps": 2,
            "num_epochs": 2,
            "eval_freq": 0,
            "num_eval_images": 4,
            "max_vis_images": 2,
            "per_gpu_capacity": 2,
            "train.total_batch_size": 4,
            "train.total_samples_per_epoch": 8,
        }
        if c.task == "train":
            defaults["eval_base_distance"] = False  # it doubles what an evaluation costs; tests that look at it set it
        with c.unlocked():
            c.update_from_flattened_dict(defaults | {k.replace("__", "."): v for k, v in overrides.items()})
        return c

    return make
