"""The drawn data sets of the training stages, kept in the work folder."""

import torch
from safetensors.torch import load_file, save_file

from scripts.tiny import world


def make(work, train=48000, test=3000, crowds=16000, seed=1):
    """Draws ``train`` and ``test`` scenes with content and style, and ``crowds`` without captions, into ``work``."""
    for name, number, offset in (("test", test, 0), ("train", train, 1)):
        generator = torch.Generator().manual_seed(seed + offset)
        contents = world.sample_contents(number, generator)
        styles = world.sample_styles(number, generator)
        images = world.draw(contents, styles, generator)
        save_file({"images": images, "contents": contents, "styles": styles}, work / f"scenes_{name}.safetensors")
    generator = torch.Generator().manual_seed(seed + 2)
    save_file({"images": world.draw_crowds(crowds, generator)}, work / "scenes_crowds.safetensors")


def load(work, name):
    """Loads the ``images`` uint8 [N, 3, 64, 64], ``contents`` [N, 4] and ``styles`` [N, 4] of the set ``name``.

    The set ``crowds`` has only images.
    """
    data = load_file(work / f"scenes_{name}.safetensors")
    return (data["images"], data["contents"], data["styles"]) if "contents" in data else data["images"]
