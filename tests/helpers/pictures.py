"""Pictures for rewards, and their form for the processors of transformers."""

import torch
from PIL import Image


def pictures(number, height=64, width=64, seed=0):
    """Pictures of 8-bit values, coarse patches on noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.rand(number, 3, 5, 5, generator=generator), (height, width))
    return ((coarse * 0.9 + 0.1 * torch.rand(number, 3, height, width, generator=generator)) * 255).round() / 255


def as_pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def differing(ours: torch.Tensor, theirs: torch.Tensor, std: float | torch.Tensor) -> float:
    """The share of normalised pixels that differ by more than a hundredth of a level of 8 bits.

    Of resized pictures a few do, by a level, because PIL computes in integers, or by two after both passes.
    """
    levels = (ours - theirs).abs() * std * 255
    assert ours.shape == theirs.shape and levels.max() < 2.5
    return (levels > 0.01).float().mean().item()
