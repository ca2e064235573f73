"""Aesthetic predictor v2.5: how much people like pictures like this one, read from SigLIP's image embedding."""

from collections.abc import Mapping, Sequence

import torch

from rewards.base import Reward, TowerConfig
from rewards.heads import AestheticV25Head, load_head
from rewards.registry import Precision
from rewards.siglip import blank_siglip, load_siglip
from rewards.skeleton import blank

SOURCE = (
    "it is models/aesthetic_predictor_v2_5.pth of github.com/discus0434/aesthetic-predictor-v2-5, whose licence is "
    "AGPL-3.0, and is not shipped here"
)


class AestheticV25Reward(Reward):
    """The linear head of aesthetic-predictor-v2-5 on SigLIP's image embedding; about 1 to 10, prompts are ignored.

    The head has no activations, so the score is an affine function of the unit embedding, and is not clamped. The
    package's authors call 5.5 a great score.

    Args:
        model: The hub name or folder of the SigLIP under the head; only its image tower is kept.
        revision: The branch, tag or commit of the SigLIP's repository. None: the newest.
        head_file: The head's local file, or its file in head_repo. It is under AGPL-3.0 and is not shipped.
        head_repo: A hub repository with the head, or a folder. None: head_file is a local file.
        head_revision: The branch, tag or commit of the head's repository. None: the newest.
        dtype: The precision of the tower; the head runs in float32. A lower one disturbs the gradient.

    Raises:
        RewardError: A file is missing or damaged, or head and SigLIP do not fit each other.
    """

    plannable = True

    def __init__(
        self,
        model: str = "google/siglip-so400m-patch14-384",
        revision: str | None = None,
        head_file: str = "aesthetic_predictor_v2_5.pth",
        head_repo: str | None = None,
        head_revision: str | None = None,
        dtype: Precision = "float32",
    ):
        super().__init__()
        self.head = load_head(AestheticV25Head, "aesthetic_v2_5", head_file, head_repo, head_revision, SOURCE)
        self.tower = load_siglip(model, revision, dtype, "aesthetic_v2_5.model", with_text=False)
        width = self.tower.model.config.vision_config.hidden_size
        self.head.check_width(width, f"aesthetic_v2_5.head_file={head_file!r}", f"aesthetic_v2_5.model={model!r}")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        config = tower_config(options["model"], "aesthetic_v2_5.model", "siglip")
        reward.tower = blank_siglip(config, options["dtype"], with_text=False)
        reward.head = AestheticV25Head.without_data(reward.tower.model.config.vision_config.hidden_size)
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.head(self.tower.embed_images(images))
