"""Similarity of a picture to its prompt or to another picture (CLIP, arXiv 2103.00020)."""

from collections.abc import Mapping, Sequence

import torch

from rewards.base import Reward, TowerConfig
from rewards.registry import Precision
from rewards.skeleton import blank, clip_tower
from rewards.target import BlankTargets, SimilarityReward
from rewards.towers import load_clip


class ClipReward(Reward):
    """Cosine similarity of image and prompt, in [-1, 1]; about 0.2 to 0.35 for a picture of its prompt (ViT-L/14).

    It is not multiplied by CLIP's logit scale (100). A weight in the spec ("clip:100") does that if it is wanted.

    Args:
        model: The hub name or folder of any transformers CLIP.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of the towers. A lower one disturbs the gradient.

    Raises:
        RewardError: The model cannot be loaded, or is not a CLIP.
    """

    plannable = True

    def __init__(
        self, model: str = "openai/clip-vit-large-patch14", revision: str | None = None, dtype: Precision = "float32"
    ):
        super().__init__()
        self.tower = load_clip(model, revision, dtype, with_text=True, field="clip.model")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        reward.tower = clip_tower(tower_config(options["model"], "clip.model", "clip"), options["dtype"])
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.tower.similarity(images, prompts)


class ClipImageReward(SimilarityReward):
    """Cosine, in [-1, 1], of CLIP's embeddings of the picture and of its target, the picture that its metadata name.

    DreamBooth (arXiv 2208.12242) calls it CLIP-I.

    Args:
        model: The hub name or folder of any transformers CLIP.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of the towers. A lower one disturbs the gradient.

    Raises:
        RewardError: The model cannot be loaded, or is not a CLIP.
    """

    def __init__(
        self, model: str = "openai/clip-vit-large-patch14", revision: str | None = None, dtype: Precision = "float32"
    ):
        super().__init__()
        self.tower = load_clip(model, revision, dtype, with_text=False, field="clip.model")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(_BlankClipImage)
        config = tower_config(options["model"], "clip.model", "clip")
        reward.tower = clip_tower(config, options["dtype"], with_text=False)
        return reward


class _BlankClipImage(BlankTargets, ClipImageReward):
    pass
