"""DINOv2 (arXiv 2304.07193) and DINOv3 (2508.10104): how much a picture looks like a given one, in their features.

The features were learnt without texts.
"""

import copy
import importlib
import os
from collections.abc import Mapping

import torch

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError
from rewards.files import load_whole, model_type
from rewards.preprocess import ClipPreprocess, StretchPreprocess
from rewards.registry import Precision
from rewards.skeleton import blank
from rewards.target import BlankTargets, SimilarityReward
from rewards.towers import ImageTower

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# By the `model_type` of a config: the class of the model, without "Model" and "Config", and its own preprocessing. Of
# DINOv2, the shortest side becomes 256, of which the middle 224 are kept.
KINDS = {
    "dinov2": ("Dinov2", lambda: ClipPreprocess(SIZE, MEAN, STD, resize_to=256)),
    "dinov3_vit": ("DINOv3ViT", lambda: StretchPreprocess(SIZE, MEAN, STD, mode="bilinear")),
}


class DinoReward(SimilarityReward):
    """Cosine, in [-1, 1], of the class tokens of the picture and of its target, the picture that its metadata name.

    With DINOv2 or DINOv3 in place of DINO, it is the measure of subject fidelity that DreamBooth (arXiv 2208.12242)
    uses.

    Args:
        model: The hub name or folder of a DINOv2 without registers, or of a vision transformer of DINOv3.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of the network. A lower one disturbs the gradient.

    Raises:
        RewardError: The model cannot be loaded, or is neither a DINOv2 nor a DINOv3.
    """

    def __init__(self, model: str = "facebook/dinov2-small", revision: str | None = None, dtype: Precision = "float32"):
        super().__init__()
        self.tower = load_dino(model, revision, dtype, field="dino.model")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(_BlankDino)
        config = copy.deepcopy(dict(tower_config(options["model"], "dino.model", tuple(KINDS))))
        stem, preprocess = KINDS[config.pop("model_type", "dinov2")]
        with torch.device("meta"):
            model = _class(f"{stem}Model")(_class(f"{stem}Config")(**config))
        reward.tower = DinoTower(model, preprocess(), options["dtype"])
        return reward


class _BlankDino(BlankTargets, DinoReward):
    pass


class DinoTower(ImageTower):
    """A frozen `transformers.Dinov2Model` or `DINOv3ViTModel`. The embedding is its class token after the last norm."""

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def load_dino(name: str, revision: str | None, dtype: str, field: str) -> DinoTower:
    """Loads the model `name`: a hub name ("facebook/dinov2-small") or a folder written by `save_pretrained`.

    Args:
        field: The option to name in an error.

    Raises:
        RewardError: It cannot be found, is of another kind, or lacks weights.
    """
    name = os.path.expanduser(name)
    kind = model_type(name, revision, field)
    if kind not in KINDS:
        raise RewardError(f"{field}={name!r} is a {kind!r} model, expected {' or '.join(map(repr, KINDS))}")
    stem, preprocess = KINDS[kind]
    return DinoTower(load_whole(_class(f"{stem}Model"), name, revision, "DINO", field), preprocess(), dtype)


def _class(name: str):
    return getattr(importlib.import_module("transformers"), name)
