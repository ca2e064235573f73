"""Image-text similarity (CLIP, arXiv 2103.00020)."""

from collections.abc import Sequence

import torch

from rewards.base import Reward
from rewards.towers import load_clip


class ClipReward(Reward):
    """Cosine similarity of image and prompt, in [-1, 1]; about 0.2 to 0.35 for a picture of its prompt (ViT-L/14).

    Not multiplied by CLIP's logit scale (100): the weight of a sum ("clip:100") does that where it is wanted.

    model: any CLIPModel, hub name or folder. revision: of the hub repository. dtype: of the towers.
    Raises: RewardError.
    """

    def __init__(
        self, model: str = "openai/clip-vit-large-patch14", revision: str | None = None, dtype: str = "float32"
    ):
        super().__init__()
        self.tower = load_clip(model, revision, dtype, with_text=True, field="clip.model")

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.tower.similarity(images, prompts)
