"""The Qwen2-VL under HPSv3, read as the hpsv3 package reads it."""

from collections.abc import Sequence

import torch
from torch import nn

from rewards.checkpointing import checkpoint_modules
from rewards.hpsv3_prompt import INSTRUCTION
from rewards.qwen_vl import QwenPreprocess, patchify, places
from rewards.towers import dtype_of

PIXELS = 256 * 28 * 28  # of every picture, about
PROMPT_LENGTH = 77  # tokens of a prompt, to plan memory
INSTRUCTION_LENGTH = 507  # tokens of the rest of the text behind the picture

# The chat's text before the picture, and what closes the picture.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>"


class Qwen2VLTower(nn.Module):
    """A frozen Qwen2-VL that reads a picture and an instruction. Its blocks recompute their activations.

    As in the release, the text's positions count on through the picture (no M-RoPE).

    Args:
        model: transformers' Qwen2VLModel, without its own rotary angles.
        dtype: The precision, a key of DTYPES (towers.py).
    """

    def __init__(self, model: nn.Module, tokenizer=None, dtype: str = "bfloat16"):
        super().__init__()
        self.dtype = dtype_of(dtype)
        self.model = model.to(self.dtype).requires_grad_(False).eval()
        checkpoint_modules([*model.visual.blocks, *model.language_model.layers])
        self.preprocess = QwenPreprocess(PIXELS, PIXELS)
        self.tokenizer = tokenizer

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the states [B, D] float32 at the reward token, of images [B, 3, H, W] in [0, 1]; differentiable."""
        text = self.model.language_model
        before, after, length = (tensor.to(images.device) for tensor in self.tokenize(prompts))
        before = text.embed_tokens(before).expand(len(images), -1, -1)
        words = torch.cat([before, self.read_pictures(self.preprocess(images)), text.embed_tokens(after)], dim=1)
        # A causal model does not see the padding that stands behind a prompt, so it needs no mask.
        states = text(inputs_embeds=words, use_cache=False).last_hidden_state
        last = states.shape[1] - after.shape[1] + length - 1
        return states[torch.arange(len(images), device=images.device), last].float()

    def read_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the image tokens [B, N, D] of pixels [B, 3, H, W], as `QwenPreprocess` makes them."""
        visual, batch = self.model.visual, len(pixels)
        angles = visual.rotary_pos_emb(places(*pixels.shape[-2:]).to(pixels.device))
        patches = patchify(pixels)
        ends = patches.shape[1] * torch.arange(batch + 1)  # each picture attends to itself
        states = visual.patch_embed(patches.flatten(0, 1))
        for block in visual.blocks:
            states = block(states, cu_seqlens=ends, position_embeddings=[a.repeat(batch, 1) for a in angles])
        return visual.merger(states).unflatten(0, (batch, -1))

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns token ids [P] before and [B, L] behind the picture, and the number [B] of the latter, int64.

        The text ends with the reward token, since a causal model does not see what follows. Rows are padded to L.
        """
        after = [AFTER + INSTRUCTION.format(text_prompt=prompt) for prompt in prompts]
        rows = [torch.tensor(ids) for ids in self.tokenizer(after).input_ids]
        before = torch.tensor(self.tokenizer(BEFORE).input_ids)
        return before, nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


class BlankTower(Qwen2VLTower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        after = torch.zeros(len(prompts), INSTRUCTION_LENGTH + PROMPT_LENGTH, dtype=torch.long, device="meta")
        return after[0, :15], after, after[:, 0]


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
