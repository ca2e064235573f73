"""The LAION aesthetic predictor: how much people like pictures like this one, on a scale of about 1 to 10."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError
from rewards.registry import Precision
from rewards.skeleton import blank, clip_tower
from rewards.towers import find_file, load_clip, load_weights

LAION_WIDTHS = (1024, 128, 64, 16, 1)
# The positions of the linear layers between the dropouts are part of the file format ("layers.2.weight").
LINEAR_AT = (0, 2, 4, 6, 7)
DROPOUT_AT = {1: 0.2, 3: 0.2, 5: 0.1}


class AestheticHead(nn.Module):
    """Five linear layers on a normalised CLIP image embedding, in the layout of LAION's published files.

    ImageReward's head has the same layers.

    Args:
        input_dim: The width of the embedding (768 for ViT-L/14).
        widths: The number of outputs of each of the five layers.
    """

    def __init__(self, input_dim: int, widths: Sequence[int] = LAION_WIDTHS):
        super().__init__()
        linear = {
            place: nn.Linear(before, after)
            for place, before, after in zip(LINEAR_AT, (input_dim, *widths[:-1]), widths, strict=True)
        }
        self.layers = nn.Sequential(
            *(linear[i] if i in linear else nn.Dropout(DROPOUT_AT[i]) for i in range(max(LINEAR_AT) + 1))
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Returns the scores [B] of vectors [B, input_dim]."""
        return self.layers(embeddings).squeeze(-1)

    @classmethod
    def without_data(cls, input_dim: int) -> "AestheticHead":
        """Returns a frozen head on torch's meta device."""
        with torch.device("meta"):
            return cls(input_dim).requires_grad_(False).eval()

    @classmethod
    def from_weights(cls, weights: Mapping[str, torch.Tensor], source: str) -> "AestheticHead":
        """Returns a head of the weights' sizes. Raises a RewardError if the weights are not those of such a head."""
        expected = {f"layers.{i}.{kind}" for i in LINEAR_AT for kind in ("weight", "bias")}
        missing, unknown = sorted(expected - set(weights)), sorted(set(weights) - expected)
        if missing or unknown:
            raise RewardError(f"{source} holds no head of LAION's layout: missing {missing}, unknown {unknown[:4]}")
        matrices = [weights[f"layers.{i}.weight"] for i in LINEAR_AT]
        if any(not isinstance(m, torch.Tensor) or m.ndim != 2 for m in matrices) or len(matrices[-1]) != 1:
            raise RewardError(f"{source} holds no head of LAION's layout: its layers do not end in one score")
        head = cls(matrices[0].shape[1], [len(m) for m in matrices])
        try:
            head.load_state_dict({name: weight.float() for name, weight in weights.items()})
        except RuntimeError as error:
            raise RewardError(f"{source} holds no head of LAION's layout: its layers do not fit each other") from error
        return head


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
        self.head = load_head(head_repo, head_file, head_revision)
        self.tower = load_clip(clip, clip_revision, dtype, with_text=False, field="aesthetic.clip")
        wanted, width = self.head.layers[0].in_features, self.tower.model.config.projection_dim
        if wanted != width:
            raise RewardError(
                f"aesthetic.head_file={head_file!r} wants embeddings of {wanted} numbers, aesthetic.clip={clip!r} "
                f"gives {width}; they belong to different models"
            )

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        config = tower_config(options["clip"], "aesthetic.clip", "clip")
        reward.tower = clip_tower(config, options["dtype"], with_text=False)
        reward.head = AestheticHead.without_data(reward.tower.model.config.projection_dim)
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.head(self.tower.embed_images(images))


def load_head(repo: str, file: str, revision: str | None = None) -> AestheticHead:
    """Loads the head from the local path `file`, or else from the hub repository or folder `repo`.

    Raises:
        RewardError: The file is missing, or is not one of LAION's heads.
    """
    path = os.path.expanduser(file)
    if not os.path.isfile(path):
        if os.path.isabs(path):
            raise RewardError(f"aesthetic.head_file={file!r} does not exist")
        path = find_file(repo, file, revision, "aesthetic.head_repo")
    head = AestheticHead.from_weights(load_weights(path, "aesthetic.head_file"), f"aesthetic.head_file={file!r}")
    return head.requires_grad_(False).eval()
