"""Rewards for how well a picture compresses as JPEG, exactly by Pillow or as a differentiable estimate.

Compressibility and incompressibility are the two file-size rewards of DDPO (arXiv 2305.13301, section 5.1), which
needs no gradient. AlignProp (arXiv 2310.03739) and similar methods need one. For them, `jpeg_proxy` follows the
baseline encoder of ITU T.81 (1992) up to its entropy coder, and gives a smooth estimate of the entropy coder's bits.
"""

import io
import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F

from rewards.base import Reward
from rewards.pictures import to_pictures

# T.81, tables K.1 and K.2: quantisation steps at quality 50, by row (vertical frequency) and column.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# JFIF 1.02, section 7: the matrix from R, G, B to Y, Cb, Cr.
YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))

# These coefficients of `estimated_sizes` are fitted by relative least squares to the files that Pillow 13 writes of 530
# pictures at qualities 95, 85, 75, 50 and 30. The pictures are drawn scenes (sharp, blurred, noisy and crowded), noise
# of five grains, gradients, and scenes at 256 x 256. The estimate is off by at most 20 % there.
BITS_PER_MAGNITUDE_BIT = 2.26  # more than 1, because every magnitude also has a Huffman code
BITS_PER_BLOCK = 4.7  # the end of block, and the code of the DC difference
HEADER_BITS = 8 * 623  # markers, two quantisation tables, four Huffman tables


class JpegCompressibility(Reward):
    """Minus the size of the picture's JPEG file in kB of 1000 bytes, as Pillow writes it. It has no gradient.

    Values are clamped to [0, 1] and rounded to 8 bits. Chroma has half the resolution (4:2:0), Pillow's default.

    Args:
        quality: The quality of the encoder, for all jpeg rewards. That of DDPO's authors is 95.
    """

    differentiable = False
    sign = -1.0

    def __init__(self, quality: Annotated[int, (1, 100)] = 95):
        super().__init__()
        self.quality = quality

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.sign * file_sizes(images, self.quality)


class JpegIncompressibility(JpegCompressibility):
    """Plus the size of the picture's JPEG file: a reward for detail."""

    sign = 1.0


class JpegProxy(Reward):
    """Minus the estimated size of the picture's JPEG file in kB of 1000 bytes: `jpeg_compressibility`, differentiable.

    A negative weight ("jpeg_proxy:-1") makes it the proxy of `jpeg_incompressibility`.

    Args:
        quality: The quality of the encoder, for all jpeg rewards. That of DDPO's authors is 95.
    """

    def __init__(self, quality: Annotated[int, (1, 100)] = 95):
        super().__init__()
        self.register_buffer("steps", quantisation_steps(quality), persistent=False)

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return -estimated_sizes(images, self.steps)


def file_sizes(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Returns the sizes [B] in kB (1000 bytes) of the JPEG files of images [B, 3, H, W] in [0, 1]."""
    sizes = []
    for picture in to_pictures(images):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, device=images.device)


def estimated_sizes(images: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Returns the estimated sizes [B] in kB (1000 bytes) of images [B, 3, H, W] in [0, 1]; differentiable.

    An AC coefficient q (in steps, not rounded) costs ½ log2(1 + 4q²) magnitude bits. This is smooth, 0 at 0, and
    log2(2|q|) for a large q, which is what T.81 writes after the Huffman code of the coefficient's size (F.1.2.2). For
    a DC coefficient, the difference to the block before it in the scan counts (F.1.2.1).

    Args:
        steps: The result of `quantisation_steps`, [2, 8, 8].
    """
    bits = HEADER_BITS
    for plane, table, per_unit in zip(_planes(images), (steps[0], steps[1], steps[1]), (2, 1, 1), strict=True):
        coefficients = (_dct(_blocks(plane, per_unit)) / table).flatten(2)
        dc = coefficients[..., 0]
        # The first block's prediction is 0.
        dc = torch.cat([dc[:, :1], dc.diff(dim=1)], dim=1)
        coefficients = torch.cat([dc[..., None], coefficients[..., 1:]], dim=2)
        magnitude = 0.5 * torch.log2(1 + 4 * coefficients.square()).sum(dim=(1, 2))
        bits = bits + BITS_PER_MAGNITUDE_BIT * magnitude + BITS_PER_BLOCK * dc.shape[1]
    return bits / 8000


def quantisation_steps(quality: int) -> torch.Tensor:
    """Returns the steps of luminance and chrominance, [2, 8, 8] float32 in 8-bit levels, for a quality of 1 … 100.

    The scaling is that of the Independent JPEG Group's library (jpeg_quality_scaling), which Pillow uses.
    """
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor([LUMINANCE, CHROMINANCE]) * percent + 50) // 100).clamp(1, 255).float()


def _planes(images):
    """Returns Y [B, H', W'], Cb and Cr [B, H'/2, W'/2] in levels around 0. H' and W' are multiples of 16."""
    height, width = images.shape[-2:]
    images = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    levels = 255 * torch.einsum("kc,bchw->kbhw", images.new_tensor(YCBCR), images)
    return levels[0] - 128, *F.avg_pool2d(levels[1:], 2)


def _blocks(plane, per_unit):
    """Returns the 8 x 8 blocks [B, N, 8, 8] of a plane [B, H, W] in the order of the scan.

    Args:
        per_unit: The side of a minimum coded unit in blocks. It is 2 for the luminance of 4:2:0 pictures (T.81, A.2.3).
    """
    batch, height, width = plane.shape
    side = 8 * per_unit
    tiles = plane.reshape(batch, height // side, per_unit, 8, width // side, per_unit, 8)
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, -1, 8, 8)


def _dct(blocks):
    """Applies the forward DCT of T.81, A.3.3, to the last two dimensions."""
    n = torch.arange(8, device=blocks.device, dtype=blocks.dtype)
    basis = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis @ blocks @ basis.T
