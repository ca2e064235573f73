"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on which of two pictures people picked for a prompt."""

from collections.abc import Sequence

import torch

from rewards.base import Reward
from rewards.towers import load_clip


class PickScoreReward(Reward):
    """The model's logit scale (100) times the cosine of image and prompt; about 18 to 24 for pictures of a prompt.

    It is the score of the published code, not divided by anything: in a sum, a weight of 0.01 makes it a cosine.

    model: any CLIPModel, hub name or folder. revision: of the hub repository. processor: hub name or folder of the
    tokenizer and the preprocessor file. dtype: of the towers.
    Raises: RewardError.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: str = "float32",
    ):
        super().__init__()
        files = (processor, "pickscore.processor")
        self.tower = load_clip(model, revision, dtype, with_text=True, field="pickscore.model", processor=files)

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.tower.scale * self.tower.similarity(images, prompts)
