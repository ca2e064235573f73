"""DINOv2 (arXiv 2304.07193): how much a picture looks like a given one, in features learnt without texts."""

import copy
import os
from collections.abc import Mapping

import torch

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError
from rewards.files import load_whole, model_type
from rewards.preprocess import ClipPreprocess
from rewards.registry import Precision
from rewards.skeleton import blank
from rewards.target import BlankTargets, SimilarityReward
from rewards.towers import ImageTower

# DINOv2's evaluation transform: the shortest side becomes 256, of which the middle 224 are kept.
RESIZE_TO, SIZE = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoReward(SimilarityReward):
    """Cosine, in [-1, 1], of the class tokens of the picture and of its target, the picture that its metadata name.

    With DINOv2 in place of DINO, it is the measure of subject fidelity that DreamBooth (arXiv 2208.12242) uses.

    Args:
        model: The hub name or folder of a DINOv2, without registers.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of the network. A lower one disturbs the gradient.

    Raises:
        RewardError: The model cannot be loaded, or is not a DINOv2.
    """

    def __init__(self, model: str = "facebook/dinov2-small", revision: str | None = None, dtype: Precision = "float32"):
        super().__init__()
        self.tower = load_dino(model, revision, dtype, field="dino.model")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        from transformers import Dinov2Config, Dinov2Model

        reward = blank(_BlankDino)
        config = Dinov2Config(**copy.deepcopy(tower_config(options["model"], "dino.model", "dinov2")))
        with torch.device("meta"):
            reward.tower = DinoTower(Dinov2Model(config), _preprocess(), options["dtype"])
        return reward


class _BlankDino(BlankTargets, DinoReward):
    pass


class DinoTower(ImageTower):
    """A frozen `transformers.Dinov2Model`. The embedding is its class token after the last norm."""

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def load_dino(name: str, revision: str | None, dtype: str, field: str) -> DinoTower:
    """Loads the DINOv2 `name`: a hub name ("facebook/dinov2-small") or a folder written by `save_pretrained`.

    Args:
        field: The option to name in an error.

    Raises:
        RewardError: It cannot be found, is not a DINOv2, or lacks weights.
    """
    from transformers import Dinov2Model

    name = os.path.expanduser(name)
    kind = model_type(name, revision, field)
    if kind != "dinov2":
        raise RewardError(f"{field}={name!r} is a {kind!r} model, expected 'dinov2'")
    return DinoTower(load_whole(Dinov2Model, name, revision, "DINOv2", field), _preprocess(), dtype)


def _preprocess() -> ClipPreprocess:
    return ClipPreprocess(SIZE, MEAN, STD, RESIZE_TO)
