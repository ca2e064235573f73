"""ImageReward (arXiv 2304.05977): a BLIP (2201.12086) fine-tuned on how people rank pictures of the same prompt."""

from collections.abc import Sequence

import torch

from rewards.blip import BlipReward
from rewards.files import find_file
from rewards.heads import AestheticHead
from rewards.registry import Precision

FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's outputs on the paper's data


class ImageReward(BlipReward):
    """How high people rank a picture for its prompt, about -2.3 to 2. Over the training pictures the mean is 0.

    It is the score of the image-reward package, made differentiable: (head(BLIP's first token) - MEAN) / STD.

    Args:
        checkpoint: A local ImageReward.pt. None: the file of that name in checkpoint_repo.
        checkpoint_repo: The hub name or folder of the checkpoint.
        checkpoint_revision: The branch, tag or commit of the hub's repository. None: the newest.
        tokenizer: The hub name or folder with the vocabulary of uncased BERT.
        dtype: The precision of BLIP; the head runs in float32. A lower one disturbs the gradient.

    Raises:
        RewardError: A file is missing or does not fit.
    """

    group, head_kind, prompt_length = "imagereward", AestheticHead, 35

    def __init__(
        self,
        checkpoint: str | None = None,
        checkpoint_repo: str = "THUDM/ImageReward",
        checkpoint_revision: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: Precision = "float32",
    ):
        super().__init__()
        where = "imagereward.checkpoint=None, imagereward.checkpoint_repo"
        path = checkpoint or find_file(checkpoint_repo, FILE, checkpoint_revision, where)
        self.load(path, tokenizer, dtype)

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return (super().score(images, prompts, metadata) - MEAN) / STD
