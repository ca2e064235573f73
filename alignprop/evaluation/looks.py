"""How pictures look, by measures that no reward is asked for: over-optimised pictures are often garish or smeared."""

import torch

LOOKS = ("saturation", "sharpness")
LUMA = (0.299, 0.587, 0.114)  # the weights of red, green and blue in ITU-R BT.601


def looks(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the measures of pictures [B, 3, H, W] in [0, 1], by name, [B] each.

    "saturation": the mean difference of the largest and the smallest channel of a pixel, from 0 (grey) to 1.
    "sharpness": the root mean square of the Laplacian of the brightness, at least 0.
    """
    images = images.float()
    saturation = (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))
    brightness = (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1)
    middle = brightness[:, 1:-1, 1:-1]
    around = brightness[:, :-2, 1:-1] + brightness[:, 2:, 1:-1] + brightness[:, 1:-1, :-2] + brightness[:, 1:-1, 2:]
    return {"saturation": saturation, "sharpness": (around - 4 * middle).square().mean(dim=(1, 2)).sqrt()}
