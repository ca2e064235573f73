"""VQAScore (arXiv 2404.01291): how probable it is that a model of pictures and text says that the picture shows it."""

import copy
import os
from collections.abc import Mapping, Sequence

import torch

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError
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
from rewards.registry import Precision
from rewards.skeleton import blank
from rewards.towers import dtype_of, load_whole, model_type

FAMILY = "qwen2_5_vl"
FEWEST, MOST = 4 * SIDE**2, 16384 * SIDE**2  # pixels of a picture, as qwen-vl-utils limits them
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
ANSWER = "Yes"
QUESTION_LENGTH = 18  # tokens of the text behind the picture, without the prompt


class VQAScoreReward(Reward):
    """The probability, from 0 to 1, that the answer to 'Does this figure show "…"?' begins with Yes.

    It is the score of the t2v_metrics package for models of this family, made differentiable. A probability near 0 or 1
    has almost no gradient, and its logarithm has none near 1.

    Args:
        model: The hub name or folder of a Qwen2.5-VL.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        log: The score is the logarithm of the probability, at most 0.
        dtype: The precision of the model, which was trained in bfloat16; the probability is computed in float32.

    Raises:
        RewardError: The model cannot be loaded, or is not a Qwen2.5-VL, or a picture is too narrow.
    """

    plannable = True

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        revision: str | None = None,
        log: bool = False,
        dtype: Precision = "bfloat16",
    ):
        super().__init__()
        whole, tokenizer, self.answer = load_qwen(model, revision, dtype, "vqascore.model")
        self.log, self.words = log, whole.lm_head.requires_grad_(False)
        self.tower = VQATower(whole.model, tokenizer, dtype)

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        reward = blank(cls)
        facts = copy.deepcopy(dict(tower_config(options["model"], "vqascore.model", "vlm")))
        check_family(facts.pop("model_type"), options["model"], "vqascore.model")
        config = Qwen2_5_VLConfig(**facts)
        with torch.device("meta"):
            whole = Qwen2_5_VLForConditionalGeneration(config)
        reward.tower = _BlankTower(whole.model, dtype=options["dtype"])
        reward.words = whole.lm_head.to(reward.tower.dtype).requires_grad_(False)
        reward.log, reward.answer = False, 0
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        logarithms = self.words(self.tower(images, prompts)).float().log_softmax(dim=-1)[:, self.answer]
        return logarithms if self.log else logarithms.exp()


class VQATower(QwenTower):
    """A Qwen2_5_VLModel that is asked whether the picture shows the prompt."""

    def __init__(self, model, tokenizer=None, dtype: str = "bfloat16"):
        super().__init__(model, QwenPreprocess(FEWEST, MOST), tokenizer, dtype)

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


class _BlankTower(VQATower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return blank_tokens(prompts, QUESTION_LENGTH)


def check_family(kind: str, name: str, field: str) -> None:
    """Raises a RewardError if a model is not a Qwen2.5-VL."""
    if kind != FAMILY:
        raise RewardError(f"{field}={name!r} is a {kind!r} model; expected {FAMILY!r}, as Qwen/Qwen2.5-VL-7B-Instruct")


def load_qwen(name: str, revision: str | None, dtype: str, field: str) -> tuple:
    """Returns (Qwen2_5_VLForConditionalGeneration, tokenizer, id of the answer) of a hub name or folder.

    Raises:
        RewardError: It cannot be loaded, is of another family, or its tokenizer does not fit.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    name = os.path.expanduser(name)
    check_family(model_type(name, revision, field), name, field)
    loader = Qwen2_5_VLForConditionalGeneration
    model = load_whole(loader, name, revision, "Qwen2.5-VL", field, dtype=dtype_of(dtype))
    tokenizer = load_qwen_tokenizer(name, revision, field)
    answer, vocabulary = tokenizer(ANSWER).input_ids, model.config.text_config.vocab_size
    if len(answer) != 1 or len(tokenizer) > vocabulary:
        raise RewardError(
            f"{field}={name!r}: its tokenizer ({len(tokenizer)} tokens, {len(answer)} of them for {ANSWER!r}) does not "
            f"fit the model ({vocabulary} tokens, 1 for {ANSWER!r})"
        )
    return model, tokenizer, answer[0]
