"""What the rewards on Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (2502.13923) share: sizes, patches and places."""

import math

import torch

from rewards.errors import RewardError
from rewards.preprocess import ClipPreprocess

PATCH, FRAMES, MERGE = 14, 2, 2  # pixels along a patch; frames in a patch; patches along a token
SIDE = PATCH * MERGE  # pixels along the square that becomes one token
NARROWEST = 200  # the largest ratio of the sides


def smart_size(height: int, width: int, fewest: int, most: int) -> tuple[int, int]:
    """Returns (height, width) in multiples of 28 pixels, close to the ratio of the sides that are given.

    The area is at most `most` pixels, and then at least `fewest`. If the two limits are equal, the area can end up
    below them, because a large picture is rounded down and a small one is rounded up.

    Raises:
        RewardError: One side is more than 200 times the other.
    """
    if max(height, width) > NARROWEST * min(height, width):
        raise RewardError(
            f"pictures of {width}x{height} pixels are too narrow for Qwen-VL: the ratio of the sides may be at most "
            f"{NARROWEST}"
        )
    rows, columns = (max(1, round(side / SIDE)) for side in (height, width))
    if rows * columns * SIDE**2 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / SIDE)) for side in (height, width))
    elif rows * columns * SIDE**2 < fewest:
        grow = math.sqrt(fewest / (height * width))
        rows, columns = (math.ceil(side * grow / SIDE) for side in (height, width))
    return rows * SIDE, columns * SIDE


class QwenPreprocess(ClipPreprocess):
    """Qwen-VL's preprocessing: resizes to about the picture's own ratio, and normalises as CLIP does.

    It equals qwen-vl-utils and transformers' Qwen2VLImageProcessor on PIL images, except for rounding (see
    `ClipPreprocess`).

    Args:
        fewest: The number of pixels below which a picture is enlarged.
        most: The number of pixels above which it is reduced.
    """

    crops = False

    def __init__(self, fewest: int, most: int):
        super().__init__(SIDE)
        self.fewest, self.most = fewest, most

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        return self.resize_like_pil(images, *smart_size(*images.shape[-2:], self.fewest, self.most))


def patchify(pixels: torch.Tensor) -> torch.Tensor:
    """Returns the patches [B, N, 1176] of pixels [B, 3, H, W], where H and W are multiples of 28.

    The four patches of a token stand together. A patch holds the picture twice, as two equal frames of a film.
    """
    batch, channels, height, width = pixels.shape
    tokens = pixels.reshape(batch, channels, height // SIDE, MERGE, PATCH, width // SIDE, MERGE, PATCH)
    patches = tokens.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return patches.expand(*patches.shape[:6], FRAMES, PATCH, PATCH).reshape(batch, height * width // PATCH**2, -1)


def places(height: int, width: int) -> torch.Tensor:
    """Returns the (row, column) [N, 2] of each patch of H x W pixels, in the order of `patchify`."""
    rows, columns = height // PATCH, width // PATCH
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return grid.view(rows // MERGE, MERGE, columns // MERGE, MERGE, 2).transpose(1, 2).reshape(-1, 2)
