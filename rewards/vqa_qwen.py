"""VQAScore on Qwen2.5-VL (arXiv 2502.13923): the model, the question in its chat, and how to load both."""

import copy
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rewards.base import TowerConfig
from rewards.errors import RewardError
from rewards.files import load_whole
from rewards.qwen_vl import (
    PATCH,
    SIDE,
    QwenPreprocess,
    QwenTower,
    blank_tokens,
    load_qwen_tokenizer,
    patchify,
    places,
)
from rewards.towers import DTYPES

FEWEST, MOST = 4 * SIDE**2, 16384 * SIDE**2  # pixels of a picture, as qwen-vl-utils limits them
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
ANSWER = "Yes"
QUESTION_LENGTH = 18  # tokens of the text behind the picture, without the prompt


class QwenVQATower(QwenTower):
    """A Qwen2_5_VLModel that is asked whether the picture shows the prompt.

    Args:
        model: See `QwenTower`.
        words: The layer that turns a state into the logits of the next token.
        answer: The token of the answer.
    """

    def __init__(self, model, words: nn.Linear, answer: int, tokenizer=None, dtype: str = "bfloat16"):
        super().__init__(model, QwenPreprocess(FEWEST, MOST), tokenizer, dtype)
        # The words may be the model's embeddings, so the layer is cast after the model.
        self.words, self.answer = words.to(self.dtype).requires_grad_(False), answer

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the logarithm [B] float32 of the answer's probability, of images [B, 3, H, W] in [0, 1]."""
        return self.words(super().forward(images, prompts)).float().log_softmax(dim=-1)[:, self.answer]

    def ask(self, prompt: str) -> str:
        return QUESTION.format(prompt) + "<|im_end|>\n<|im_start|>assistant\n"

    def read_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = pixels.shape
        # The grid stays on the CPU, because the model turns it into lists. The positions are needed beside the pixels.
        grid = torch.tensor([[1, height // PATCH, width // PATCH]]).expand(batch, -1)
        positions = places(height, width).repeat(batch, 1).to(pixels.device)
        patches = patchify(pixels).flatten(0, 1)
        return self.model.visual(patches, grid_thw=grid, position_ids=positions).pooler_output.unflatten(0, (batch, -1))

    def positions(self, before: int, height: int, width: int, after: int) -> torch.Tensor:
        """Returns M-RoPE's positions [3, L] (arXiv 2409.12191, section 2.1).

        A picture is one instant. The text behind it goes on after its longer side.
        """
        rows, columns = height // SIDE, width // SIDE
        place = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns)).T
        text = torch.arange(before), before + max(rows, columns) + torch.arange(after)
        return torch.cat([text[0].expand(3, -1), before + place, text[1].expand(3, -1)], dim=1)


class _BlankTower(QwenVQATower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return blank_tokens(prompts, QUESTION_LENGTH)


def load_qwen(
    name: str, revision: str | None, facts: Mapping, tokenizer: str | None, dtype: str, field: str
) -> QwenVQATower:
    """Loads the Qwen2.5-VL of a hub name or folder. The arguments are those of `Family.load` (vqascore.py).

    Raises:
        RewardError: It cannot be loaded, or its tokenizer does not fit.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    name = os.path.expanduser(name)
    loader = Qwen2_5_VLForConditionalGeneration
    whole = load_whole(loader, name, revision, "Qwen2.5-VL", field, dtype=DTYPES[dtype])
    files, files_field = (tokenizer, "vqascore.tokenizer") if tokenizer else (name, field)
    words = load_qwen_tokenizer(files, None if tokenizer else revision, files_field)
    answer, vocabulary = words(ANSWER).input_ids, whole.config.text_config.vocab_size
    if len(answer) != 1 or len(words) > vocabulary:
        raise RewardError(
            f"{files_field}={files!r}: its tokenizer ({len(words)} tokens, {len(answer)} of them for {ANSWER!r}) does "
            f"not fit the model ({vocabulary} tokens, 1 for {ANSWER!r})"
        )
    return QwenVQATower(whole.model, whole.lm_head, answer[0], words, dtype)


def blank_qwen(facts: Mapping, tower_config: TowerConfig, dtype: str, field: str) -> QwenVQATower:
    """Returns a Qwen2.5-VL on the meta device. The arguments are those of `Family.blank` (vqascore.py)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(**copy.deepcopy(dict(facts)))
    with torch.device("meta"):
        whole = Qwen2_5_VLForConditionalGeneration(config)
    return _BlankTower(whole.model, whole.lm_head, 0, dtype=dtype)
