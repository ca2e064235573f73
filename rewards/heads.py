"""Heads that turn a vector into a score: five linear layers, in the layouts of the published files."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rewards.checkpoints import find_checkpoint
from rewards.errors import RewardError
from rewards.files import load_weights

WIDTHS = (1024, 128, 64, 16, 1)


class AestheticHead(nn.Module):
    """Five linear layers on a normalised CLIP image embedding, in the layout of LAION's published files.

    ImageReward's head has the same layers. The other heads are subclasses.

    Args:
        input_dim: The width of the embedding (768 for ViT-L/14).
        widths: The number of outputs of each of the five layers.

    Attributes:
        linear_at: The positions of the linear layers, which are part of the file format ("layers.2.weight").
        prefix: What the names in a file begin with.
        owner: Whose layout it is.
    """

    linear_at = (0, 2, 4, 6, 7)
    prefix = "layers."
    owner = "LAION"

    def __init__(self, input_dim: int, widths: Sequence[int] = WIDTHS):
        super().__init__()
        linear = {
            place: nn.Linear(before, after)
            for place, before, after in zip(self.linear_at, (input_dim, *widths[:-1]), widths, strict=True)
        }
        self.layers = nn.Sequential(
            *(linear[i] if i in linear else self.between(i) for i in range(max(self.linear_at) + 1))
        )

    def between(self, place: int) -> nn.Module:
        """Returns the module at a position between two linear layers."""
        return nn.Dropout({1: 0.2, 3: 0.2, 5: 0.1}[place])

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
        """Returns a frozen float32 head of the weights' sizes.

        Raises:
            RewardError: The weights are not those of such a head.
        """
        expected = {f"{cls.prefix}{i}.{kind}" for i in cls.linear_at for kind in ("weight", "bias")}
        missing, unknown = sorted(expected - set(weights)), sorted(set(weights) - expected)
        refused = f"{source} holds no head of {cls.owner}'s layout"
        if missing or unknown:
            raise RewardError(f"{refused}: missing {missing}, unknown {unknown[:4]}")
        matrices = [weights[f"{cls.prefix}{i}.weight"] for i in cls.linear_at]
        if any(not isinstance(m, torch.Tensor) or m.ndim != 2 for m in matrices) or len(matrices[-1]) != 1:
            raise RewardError(f"{refused}: its layers do not end in one score")
        head = cls(matrices[0].shape[1], [len(m) for m in matrices])
        try:
            head.layers.load_state_dict({name.removeprefix(cls.prefix): w.float() for name, w in weights.items()})
        except RuntimeError as error:
            raise RewardError(f"{refused}: its layers do not fit each other") from error
        return head.requires_grad_(False).eval()

    def check_width(self, width: int, source: str, tower: str) -> None:
        """Raises a RewardError if the head does not take the vectors, `width` numbers long, that `tower` gives."""
        if self.layers[0].in_features != width:
            raise RewardError(
                f"{source} wants embeddings of {self.layers[0].in_features} numbers, {tower} gives {width}; they "
                "belong to different models"
            )


class AestheticV25Head(AestheticHead):
    """The head of aesthetic-predictor-v2-5, on a normalised SigLIP image embedding."""

    linear_at = (0, 2, 4, 6, 8)
    prefix = "scoring_head."
    owner = "aesthetic-predictor-v2-5"

    def between(self, place: int) -> nn.Module:
        return nn.Dropout(0.2 if place == 7 else 0.5)


class CycleHead(AestheticHead):
    """The head of CycleReward, on a token's state. It has GELUs between its layers."""

    linear_at = (0, 2, 4, 6, 8)
    owner = "CycleReward"

    def between(self, place: int) -> nn.Module:
        return nn.GELU()


def load_head(
    kind: type[AestheticHead], group: str, file: str, repo: str | None, revision: str | None, hint: str = ""
) -> AestheticHead:
    """Loads a head from a local file, or else from a hub repository or folder.

    Args:
        group: The group of the options head_file and head_repo, for an error.
        hint: See `find_checkpoint`.

    Raises:
        RewardError: The file is missing, or holds no head of that kind.
    """
    field = f"{group}.head_file"
    path = find_checkpoint(file, repo, revision, (field, f"{group}.head_repo"), hint)
    return kind.from_weights(load_weights(path, field), f"{field}={file!r}")
