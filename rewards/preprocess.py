"""Turns images in [0, 1] into the pixels that an image tower expects, differentiably and without torchvision."""

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rewards.errors import RewardError

# The values of OpenAI's CLIP, which open_clip and HPSv2 share. A folder without a preprocessor file means these.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PIL_FILTERS = {2: "bilinear", 3: "bicubic"}


def resize(images: torch.Tensor, height: int, width: int, mode: str = "bicubic") -> torch.Tensor:
    """Resizes images [B, 3, H, W] with antialiasing. If the size is already right, it changes no bit."""
    return F.interpolate(images, (height, width), mode=mode, antialias=True, align_corners=False)


def resize_like_pil(images: torch.Tensor, height: int, width: int, mode: str = "bicubic") -> torch.Tensor:
    """Resizes images [B, 3, H, W] as PIL does: first the width, then the height, with 8 bits per value after each.

    So a reward sees the pixels that its published code makes of a file of 8 bits. Only a value close to the middle of
    two levels can become the other one, because PIL computes in integers: about one of a thousand values with bicubic
    weights, and one of a hundred with bilinear ones. The gradient is that of the resize without the rounding. If the
    size is already right, no value in [0, 1] is changed.
    """
    for size in ((images.shape[-2], width), (height, width)):
        if size != images.shape[-2:]:
            images = round_to_8_bits(resize(images, *size, mode).clamp(0, 1))
    return images.clamp(0, 1)


def round_to_8_bits(images: torch.Tensor) -> torch.Tensor:
    """Rounds values in [0, 1] to the nearest of 256 levels. The gradient passes as if it did not round."""
    return images + ((images.detach() * 255 + 0.5).floor() / 255 - images.detach())


class ClipPreprocess(nn.Module):
    """CLIP's own preprocessing: resizes the shortest side to `resize_to`, crops the centre to `size`, and normalises.

    It equals transformers' CLIPImageProcessor on PIL images (see `resize_like_pil`).

    Args:
        size: The side in pixels of the square that the tower expects.
        mean: Per channel. None: the usual values of the class.
        std: Per channel. None: the usual values of the class.
        resize_to: The shortest side before the crop. None: `size`.
        mode: "bicubic" or "bilinear".
    """

    usual_mean, usual_std = CLIP_MEAN, CLIP_STD
    crops = True

    def __init__(
        self,
        size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resize_to: int | None = None,
        mode: str = "bicubic",
    ):
        super().__init__()
        self.size, self.resize_to, self.mode = size, resize_to or size, mode
        for name, values in (("mean", mean or self.usual_mean), ("std", std or self.usual_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @classmethod
    def from_json(cls, text: str, size: int, source: str) -> "ClipPreprocess":
        """Reads the text of a `preprocessor_config.json` or `processor_config.json`.

        Args:
            size: The side in pixels of the square images that the tower accepts.
            source: What to name in an error.

        Raises:
            RewardError: The file has a value that is not supported.
        """
        config = json.loads(text)
        config = config.get("image_processor", config)
        resize_to = config.get("size", size)
        if isinstance(resize_to, dict):
            if resize_to.get("height") != resize_to.get("width"):
                raise RewardError(f"{source}: size={resize_to!r} is no square, and the image tower wants one")
            resize_to = resize_to.get("shortest_edge") or resize_to.get("height") or size
        steps = {"do_resize": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
        if cls.crops:
            steps["do_center_crop"] = True
        for name, usual in steps.items():
            if config.get(name) is not None and abs(config[name] - usual) > 1e-6:
                raise RewardError(f"{source}: {name}={config[name]!r} is not supported; it must be {usual!r}")
        resample = config.get("resample", 3)
        if resample not in PIL_FILTERS:
            raise RewardError(f"{source}: resample={resample!r} is not supported; allowed: {PIL_FILTERS}")
        if resize_to < size or (resize_to > size and not cls.crops):
            raise RewardError(f"{source}: resizes to {resize_to} pixels, but the image tower wants {size}")
        return cls(size, config.get("image_mean"), config.get("image_std"), resize_to, PIL_FILTERS[resample])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the normalised pixels [B, 3, size, size] float32 of images [B, 3, H, W] in [0, 1]."""
        # Not every device can antialias in bfloat16, and 8 bits of mantissa are too few for an image anyway.
        return (self.fit(images.float()) - self.mean) / self.std

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        short = min(height, width)
        images = resize_like_pil(images, *(int(self.resize_to * side / short) for side in (height, width)), self.mode)
        top, left = (self.margin(side - self.size) for side in images.shape[-2:])
        return images[..., top : top + self.size, left : left + self.size]

    def margin(self, surplus: int) -> int:
        """Returns how many of the `surplus` rows or columns a crop cuts away at the top or the left."""
        return surplus // 2


class TorchvisionPreprocess(ClipPreprocess):
    """The preprocessing of torchvision's Resize and CenterCrop, which round half a row or column to the even number."""

    def margin(self, surplus: int) -> int:
        return round(surplus / 2)


class SquashPreprocess(ClipPreprocess):
    """SigLIP's preprocessing: resizes both sides to `size`, which may distort the picture, and scales to [-1, 1]."""

    usual_mean = usual_std = (0.5, 0.5, 0.5)
    crops = False

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        return resize_like_pil(images, self.size, self.size, self.mode)


class StretchPreprocess(ClipPreprocess):
    """DINOv3's preprocessing: resizes both sides to `size`, which may distort the picture, without rounding."""

    crops = False

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        return resize(images, self.size, self.size, self.mode)


class PadPreprocess(ClipPreprocess):
    """HPSv2's preprocessing: resizes the longest side to `size` and pads with black. Bicubic overshoot is kept.

    It equals the hpsv2 package's transform with torchvision 0.17 or later, which resizes tensors, and does not round
    them. Older versions resized tensors without antialiasing.
    """

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        scale = self.size / max(images.shape[-2:])
        height, width = (round(side * scale) for side in images.shape[-2:])
        images = resize(images, height, width, self.mode)
        rows, columns = self.size - height, self.size - width
        return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
