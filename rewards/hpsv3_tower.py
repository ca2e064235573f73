"""The Qwen2-VL under HPSv3, read as the hpsv3 package reads it."""

import torch
from torch import nn

from rewards.hpsv3_prompt import INSTRUCTION
from rewards.qwen_vl import QwenPreprocess, QwenTower, blank_tokens, patchify, places

PIXELS = 256 * 28 * 28  # of every picture, about
INSTRUCTION_LENGTH = 507  # tokens of the text behind the picture, without the prompt


class HPSv3Tower(QwenTower):
    """A Qwen2VLModel without its own rotary angles. The tower's states are those at the reward token.

    As in the release, the text's positions count on through the picture (no M-RoPE).
    """

    def __init__(self, model: nn.Module, tokenizer=None, dtype: str = "bfloat16"):
        super().__init__(model, QwenPreprocess(PIXELS, PIXELS), tokenizer, dtype)

    def ask(self, prompt: str) -> str:
        return INSTRUCTION.format(text_prompt=prompt)

    def read_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        visual, batch = self.model.visual, len(pixels)
        angles = visual.rotary_pos_emb(places(*pixels.shape[-2:]).to(pixels.device))
        patches = patchify(pixels)
        ends = patches.shape[1] * torch.arange(batch + 1)  # each picture attends to itself
        states = visual.patch_embed(patches.flatten(0, 1))
        for block in visual.blocks:
            states = block(states, cu_seqlens=ends, position_embeddings=[a.repeat(batch, 1) for a in angles])
        return visual.merger(states).unflatten(0, (batch, -1))


class BlankTower(HPSv3Tower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return blank_tokens(prompts, INSTRUCTION_LENGTH)


class Rotary(nn.Module):
    """The angles of rotary positions (arXiv 2104.09864), with the bfloat16 frequencies that HPSv3 was trained with.

    The package casts the whole model to bfloat16, and the frequencies with it. After some hundred positions the angles
    differ by about 1 from those of exact frequencies, so the rounding is part of the model.

    Args:
        width: The number of channels that positions along one axis rotate.
        base: The ratio of the highest frequency to the lowest one, about.
    """

    def __init__(self, width: int, base: float):
        super().__init__()
        frequencies = 1 / base ** (torch.arange(0, width, 2, dtype=torch.float) / width)
        self.register_buffer("frequencies", frequencies.bfloat16(), persistent=False)


class TextRotary(Rotary):
    def forward(self, states: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines [B, L, width] for three equal copies of the positions, [3, B, L]."""
        angles = (positions[0, ..., None].float() * self.frequencies.float()).repeat(1, 1, 2)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)


class VisionRotary(Rotary):
    def forward(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines [N, 4 · len(frequencies)] bfloat16 for rows and columns [N, 2].

        The package rounds the angles to bfloat16, too, and takes their cosines and sines in this precision.
        """
        angles = (places[..., None].bfloat16() * self.frequencies.bfloat16()).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()
