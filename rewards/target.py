"""Rewards that compare each picture with a picture of the user's, which the metadata name."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from rewards.base import Reward
from rewards.errors import RewardError, first_line
from rewards.towers import ImageTower

COLUMN = "target"  # the entry of the metadata with the path of a picture
KEPT_BYTES = 2**28  # of prepared targets, on the CPU


class TargetReward(Reward):
    """Compares each picture with the picture whose path is its metadata's "target".

    A subclass implements `prepare` and `compare`. What `prepare` makes of a target is kept, so that a target is read
    once as long as all of them fit in KEPT_BYTES.
    """

    def __init__(self):
        super().__init__()
        self.kept: dict[tuple, torch.Tensor] = {}

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.compare(images, self.targets(images, prompts, metadata))

    def prepare(self, target: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Returns [1, …] of a target [1, 3, h, w] in [0, 1], for pictures of that height and width."""
        raise NotImplementedError

    def compare(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns scores [B] of images [B, 3, H, W] in [0, 1], given their prepared targets [B, …]."""
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        """Returns the prepared targets [B, …] of the images, on their device.

        Raises:
            RewardError: The metadata of a prompt name no target, or one that is not a picture.
        """
        rows = metadata or [{}] * len(prompts)
        return torch.cat([self._target(images, *row) for row in zip(prompts, rows, strict=True)])

    def _target(self, images: torch.Tensor, prompt: str, row: dict) -> torch.Tensor:
        path, size = row.get(COLUMN), tuple(images.shape[-2:])
        if not isinstance(path, str) or not path.strip():
            raise RewardError(
                f"prompt {prompt!r}: metadata {COLUMN!r} is {path!r}; this reward needs the path of a picture there"
            )
        if (path, size) not in self.kept:
            prepared = self.prepare(load_picture(path, prompt).to(images.device), *size)
            self.kept[path, size] = prepared.cpu()
            while sum(t.numel() * t.element_size() for t in self.kept.values()) > KEPT_BYTES and len(self.kept) > 1:
                del self.kept[next(iter(self.kept))]
        return self.kept[path, size].to(images.device)


class SimilarityReward(TargetReward):
    """The cosine, in [-1, 1], of a picture's and its target's embedding by `tower`."""

    plannable = True
    tower: ImageTower

    def prepare(self, target: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return self.tower.embed_images(target)

    def compare(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.tower.embed_images(images) * targets).sum(dim=-1)


class BlankTargets:
    """Takes each picture as its own target, whatever the metadata."""

    @torch.no_grad()
    def targets(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.prepare(images, *images.shape[-2:])


def load_picture(path: str, prompt: str) -> torch.Tensor:
    """Returns a picture [1, 3, H, W] float32 in [0, 1] of any format that Pillow reads. Transparent parts are white.

    Raises:
        RewardError: It cannot be read. The message names the prompt.
    """
    try:
        with Image.open(os.path.expanduser(path)) as file:
            picture = file.convert("RGBA")
    except Exception as error:  # Pillow's readers of damaged files raise many kinds
        raise RewardError(
            f"prompt {prompt!r}: {COLUMN}={path!r} cannot be read as a picture ({first_line(error)}); the path is "
            "absolute, or relative to the folder of the prompt file or to the current directory"
        ) from error
    white = Image.new("RGBA", picture.size, "white")
    pixels = torch.from_numpy(np.array(Image.alpha_composite(white, picture).convert("RGB")))
    return pixels.permute(2, 0, 1).unsqueeze(0).float() / 255
