"""Shared fixtures: a random-weight Stable Diffusion in its folder."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.single_file import make_pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """{"epsilon": folder, "v_prediction": folder}."""
    root = tmp_path_factory.mktemp("pipelines")
    small = dict(channels=(16, 32), layers_per_block=1, vae_channels=(8, 16), text_width=16)
    return {kind: make_pipeline(root / kind, kind, **small) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(scope="session")
def pipeline_folder(pipelines):
    return pipelines["epsilon"]
