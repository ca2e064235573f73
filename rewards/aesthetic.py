"""The LAION aesthetic predictor: how much people like pictures like this one, on a scale of about 1 to 10."""

from collections.abc import Mapping, Sequence

import torch

from rewards.base import Reward, TowerConfig
from rewards.heads import AestheticHead, load_head
from rewards.registry import Precision
from rewards.skeleton import blank, clip_tower
from rewards.towers import load_clip


class AestheticReward(Reward):
    """LAION's linear aesthetic head on CLIP ViT-L/14 image embeddings; prompts are ignored.

    Args:
        clip: The hub name or folder of the CLIP under the head; only its image tower is kept.
        clip_revision: The branch, tag or commit of the CLIP's repository. None: the newest.
        head_repo: The hub repository of the head, or a folder.
        head_file: The head's file in it, or a local .pth or .safetensors file.
        head_revision: The branch, tag or commit of the head's repository. None: the newest.
        dtype: The precision of the tower; the head runs in float32. A lower one disturbs the gradient.

    Raises:
        RewardError: A file is missing or damaged, or head and CLIP do not fit each other.
    """

    plannable = True

    def __init__(
        self,
        clip: str = "openai/clip-vit-large-patch14",
        clip_revision: str | None = None,
        head_repo: str = "trl-lib/ddpo-aesthetic-predictor",
        head_file: str = "aesthetic-model.pth",
        head_revision: str | None = None,
        dtype: Precision = "float32",
    ):
        super().__init__()
        # The head is loaded first, because it is small and its name is as easily misspelt as the tower's.
        self.head = load_head(AestheticHead, "aesthetic", head_file, head_repo, head_revision)
        self.tower = load_clip(clip, clip_revision, dtype, with_text=False, field="aesthetic.clip")
        width = self.tower.model.config.projection_dim
        self.head.check_width(width, f"aesthetic.head_file={head_file!r}", f"aesthetic.clip={clip!r}")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        config = tower_config(options["clip"], "aesthetic.clip", "clip")
        reward.tower = clip_tower(config, options["dtype"], with_text=False)
        reward.head = AestheticHead.without_data(reward.tower.model.config.projection_dim)
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.head(self.tower.embed_images(images))
