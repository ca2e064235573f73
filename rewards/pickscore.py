"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on which of two pictures people picked for a prompt."""

from collections.abc import Mapping, Sequence

import torch

from rewards.base import Reward, TowerConfig
from rewards.registry import Precision
from rewards.skeleton import blank, clip_tower
from rewards.towers import load_clip


class PickScoreReward(Reward):
    """The model's logit scale (100) times the cosine of image and prompt; about 18 to 24 for a picture of its prompt.

    It is the score of the published code, not divided by anything. A weight of 0.01 makes it a cosine.

    Args:
        model: The hub name or folder of a transformers CLIP that was trained on picks.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        processor: The hub name or folder of its tokenizer and preprocessing.
        dtype: The precision of the towers. A lower one disturbs the gradient.

    Raises:
        RewardError: The model or its processor cannot be loaded, or is not a CLIP's.
    """

    plannable = True

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: Precision = "float32",
    ):
        super().__init__()
        files = (processor, "pickscore.processor")
        self.tower = load_clip(model, revision, dtype, with_text=True, field="pickscore.model", processor=files)

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        reward.tower = clip_tower(tower_config(options["model"], "pickscore.model", "clip"), options["dtype"])
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.tower.scale * self.tower.similarity(images, prompts)
