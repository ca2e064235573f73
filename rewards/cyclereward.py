"""CycleReward (arXiv 2506.02095): a BLIP that judges a picture by how well its prompt can be found back from it."""

from rewards.blip import BlipReward
from rewards.checkpoints import find_checkpoint
from rewards.heads import CycleHead
from rewards.registry import Precision

SOURCE = "the files are those of release v1.0.0 of github.com/hjbahng/cyclereward"


class CycleReward(BlipReward):
    """How well picture and prompt agree; not limited, and not normalised.

    It is the score of the cyclereward package, made differentiable: head(BLIP's first token). The three released files,
    Combo, I2T and T2I, have the same layout. The authors recommend Combo.

    Args:
        checkpoint: A local CycleReward-Combo.pth, -I2T.pth or -T2I.pth, or the name of the file in checkpoint_repo.
        checkpoint_repo: A hub repository with the checkpoint, or a folder. None: checkpoint is a local file.
        checkpoint_revision: The branch, tag or commit of the hub's repository. None: the newest.
        tokenizer: The hub name or folder with the vocabulary of uncased BERT.
        dtype: The precision of BLIP; the head runs in float32. A lower one disturbs the gradient.

    Raises:
        RewardError: A file is missing or does not fit.
    """

    group, head_kind, prompt_length = "cyclereward", CycleHead, 128

    def __init__(
        self,
        checkpoint: str = "CycleReward-Combo.pth",
        checkpoint_repo: str | None = None,
        checkpoint_revision: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: Precision = "float32",
    ):
        super().__init__()
        fields = ("cyclereward.checkpoint", "cyclereward.checkpoint_repo")
        path = find_checkpoint(checkpoint, checkpoint_repo, checkpoint_revision, fields, SOURCE)
        self.load(path, tokenizer, dtype)
