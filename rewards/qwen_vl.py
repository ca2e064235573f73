"""What the rewards on Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (2502.13923) share: pictures, text and how to load."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from rewards.checkpointing import checkpoint_modules
from rewards.errors import RewardError
from rewards.files import read_tokenizer
from rewards.preprocess import ClipPreprocess, resize_like_pil
from rewards.towers import DTYPES

PATCH, FRAMES, MERGE = 14, 2, 2  # pixels along a patch; frames in a patch; patches along a token
SIDE = PATCH * MERGE  # pixels along the square that becomes one token
NARROWEST = 200  # the largest ratio of the sides
PROMPT_LENGTH = 77  # tokens of a prompt, to plan memory

# The chat's text before the picture, and what closes the picture.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>"


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

    It equals qwen-vl-utils and transformers' Qwen2VLImageProcessor on PIL images (see `resize_like_pil`).

    Args:
        fewest: The number of pixels below which a picture is enlarged.
        most: The number of pixels above which it is reduced.
    """

    crops = False

    def __init__(self, fewest: int, most: int):
        super().__init__(SIDE)
        self.fewest, self.most = fewest, most

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        return resize_like_pil(images, *smart_size(*images.shape[-2:], self.fewest, self.most), self.mode)


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


class QwenTower(nn.Module):
    """A frozen Qwen-VL that reads a picture and a text behind it. Its blocks recompute their activations.

    A subclass says which text that is (`ask`), how pictures are read, and, if they do not just count on, which
    positions the tokens have.

    Args:
        model: transformers' Qwen2VLModel or Qwen2_5_VLModel.
        dtype: The precision of its weights, a key of DTYPES (towers.py). Its rotary angles keep their own.
    """

    def __init__(self, model: nn.Module, preprocess: QwenPreprocess, tokenizer=None, dtype: str = "bfloat16"):
        super().__init__()
        self.dtype = DTYPES[dtype]
        for weight in model.parameters():
            weight.data = weight.data.to(self.dtype)
        self.model = model.requires_grad_(False).eval()
        checkpoint_modules([*model.visual.blocks, *model.language_model.layers])
        self.preprocess = preprocess
        self.tokenizer = tokenizer

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the final states [B, D] at the last token, of images [B, 3, H, W] in [0, 1]; differentiable."""
        text, pixels = self.model.language_model, self.preprocess(images)
        before, after, length = (tensor.to(images.device) for tensor in self.tokenize(prompts))
        words = torch.cat([
            text.embed_tokens(before).expand(len(images), -1, -1), self.read_pictures(pixels), text.embed_tokens(after),
        ], dim=1)  # fmt: skip
        positions = self.positions(len(before), *pixels.shape[-2:], after.shape[1])
        if positions is not None:
            positions = positions[:, None].expand(-1, len(images), -1).to(images.device)
        # A causal model does not see the padding that stands behind a text, so it needs no mask.
        states = text(inputs_embeds=words, position_ids=positions, use_cache=False).last_hidden_state
        last = states.shape[1] - after.shape[1] + length - 1
        return states[torch.arange(len(images), device=images.device), last]

    def ask(self, prompt: str) -> str:
        """Returns the text behind the picture. The model is read at its last token."""
        raise NotImplementedError

    def read_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the image tokens [B, N, D] of pixels [B, 3, H, W], as `QwenPreprocess` makes them."""
        raise NotImplementedError

    def positions(self, before: int, height: int, width: int, after: int) -> torch.Tensor | None:
        """Returns the positions [3, L] in time, height and width, or None if the tokens are just counted.

        Args:
            before: The number of tokens before the picture.
            height: Of the picture, in pixels.
            width: Of the picture, in pixels.
            after: The number of tokens behind it.
        """
        return None

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns token ids [P] before and [B, L] behind the picture, and the number [B] of the latter, int64.

        Rows are padded to L on the right.
        """
        rows = [torch.tensor(ids) for ids in self.tokenizer([AFTER + self.ask(prompt) for prompt in prompts]).input_ids]
        before = torch.tensor(self.tokenizer(BEFORE).input_ids)
        return before, nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def blank_tokens(prompts: Sequence[str], text: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what `QwenTower.tokenize` does, without data, for long prompts in a text of so many tokens besides."""
    after = torch.zeros(len(prompts), text + PROMPT_LENGTH, dtype=torch.long, device="meta")
    return after[0, :15], after, after[:, 0]


def load_qwen_tokenizer(name: str, revision: str | None, field: str):
    """Loads the Qwen2Tokenizer of a hub name or folder. Raises a RewardError if there is none."""
    from transformers import Qwen2Tokenizer

    return read_tokenizer(Qwen2Tokenizer, name, revision, "Qwen2", field)
