"""Pictures of 8 bits, for rewards that look at them through a program without a gradient."""

import torch


@torch.no_grad()
def to_pictures(images: torch.Tensor) -> list:
    """Returns PIL pictures of images [B, 3, H, W], clamped to [0, 1] and rounded to 8 bits."""
    from PIL import Image

    pixels = (images * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]
