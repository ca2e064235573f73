"""VQAScore on LLaVA-1.5 (arXiv 2310.03744): a Llama reads CLIP's patches, the question and the answer."""

import copy
import os
from collections.abc import Mapping, Sequence

import torch

from rewards.base import TowerConfig
from rewards.errors import RewardError, first_line
from rewards.files import load_whole, read_tokenizer
from rewards.towers import DTYPES, load_preprocess
from rewards.vqa_clip import AFTER, ANSWER, BEFORE, ClipVQATower, SquarePreprocess, blank_tokens


class LlavaTower(ClipVQATower):
    """LLaVA-1.5: the text behind the picture ends with Yes, and the model says Yes and then the end token.

    Args:
        model: transformers' LlavaForConditionalGeneration. Its CLIP is taken out of it.
        preprocess: See `ClipVQATower`, as all other arguments.
    """

    def __init__(self, model, preprocess, tokenizer, answer, vocabulary, dtype: str = "bfloat16"):
        vision, layer = model.model.vision_tower, model.config.vision_feature_layer
        del model.model.vision_tower
        blocks = model.model.language_model.layers
        super().__init__(model, vision, layer, blocks, preprocess, tokenizer, answer, vocabulary, dtype)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.model.multi_modal_projector(states)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.model.language_model.embed_tokens(tokens)

    def spell(self, prompts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        texts = [BEFORE, *(f"{AFTER.format(prompt)} {ANSWER}" for prompt in prompts)]
        before, *behind = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [self.tokenizer.bos_token_id, *before], behind

    def answer_logits(self, words: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        # A causal model does not see the padding that stands behind a text, so it needs no mask. Without one,
        # transformers looks at the values of the positions, and tensors on the meta device have none.
        mask = words.new_ones(1, 1, words.shape[1], words.shape[1], dtype=torch.bool) if words.is_meta else None
        llama = self.model.model.language_model
        states = llama(inputs_embeds=words, attention_mask=mask, use_cache=False).last_hidden_state
        rows, last = torch.arange(len(words), device=words.device)[:, None], length[:, None]
        return self.model.lm_head(states[rows, torch.cat([last - 2, last - 1], dim=1)])


class _BlankTower(LlavaTower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return blank_tokens(prompts)


def load_llava(
    name: str, revision: str | None, facts: Mapping, tokenizer: str | None, dtype: str, field: str
) -> LlavaTower:
    """Loads the LLaVA-1.5 of a hub name or folder. The arguments are those of `Family.load` (vqascore.py).

    Raises:
        RewardError: It cannot be loaded, is of another kind, or its tokenizer does not fit.
    """
    from transformers import LlavaForConditionalGeneration

    config, name = llava_config(facts, f"{field}={name!r}"), os.path.expanduser(name)
    model = load_whole(LlavaForConditionalGeneration, name, revision, "LLaVA", field, dtype=DTYPES[dtype])
    preprocess = load_preprocess(SquarePreprocess, name, revision, config.vision_config.image_size, field)
    files, files_field, files_revision = name, field, revision
    if tokenizer:
        files, files_field, files_revision = tokenizer, "vqascore.tokenizer", None
    words, answer = load_llama_tokenizer(files, files_revision, config.text_config.vocab_size, files_field)
    # The tokens that were added, for the picture and for padding, are no words of the original model.
    return LlavaTower(model, preprocess, words, answer, words.vocab_size, dtype)


def blank_llava(facts: Mapping, tower_config: TowerConfig, dtype: str, field: str) -> LlavaTower:
    """Returns a LLaVA-1.5 on the meta device. The arguments are those of `Family.blank` (vqascore.py)."""
    from transformers import LlavaForConditionalGeneration

    config = llava_config(facts, field)
    with torch.device("meta"):
        model, answer = LlavaForConditionalGeneration(config), torch.zeros(2, dtype=torch.long)
    preprocess = SquarePreprocess(config.vision_config.image_size)
    return _BlankTower(model, preprocess, None, answer, config.text_config.vocab_size, dtype)


def llava_config(facts: Mapping, source: str):
    """Returns the LlavaConfig of what a config.json says. Raises a RewardError if it is not that of a LLaVA-1.5."""
    from transformers import LlavaConfig

    if "mm_vision_tower" in facts:
        raise RewardError(
            f"{source} is a LLaVA in its authors' own layout; expected the layout of transformers, as "
            "llava-hf/llava-1.5-7b-hf"
        )
    try:
        config = LlavaConfig(**copy.deepcopy(dict(facts)))
    except Exception as error:  # wrong types and values fail in many ways
        raise RewardError(f"{source}: its config.json is not that of a LLaVA: {first_line(error)}") from error
    found = {
        "text_config.model_type": (config.text_config.model_type, "llama"),
        "vision_config.model_type": (config.vision_config.model_type, "clip_vision_model"),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, "default"),
    }
    for key, (value, allowed) in found.items():
        if value != allowed:
            raise RewardError(f"{source}: {key}={value!r} is not supported; allowed: {allowed!r}")
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise RewardError(f"{source}: vision_feature_layer={layer!r} is not one of the CLIP's {depth} layers")
    return config


def load_llama_tokenizer(name: str, revision: str | None, vocabulary: int, field: str) -> tuple:
    """Returns the LlamaTokenizer of a hub name or folder, and the tokens [2] of the answer.

    Raises:
        RewardError: There is none, or it does not fit a model with so many tokens.
    """
    from transformers import LlamaTokenizer

    tokenizer = read_tokenizer(LlamaTokenizer, name, revision, "Llama", field)
    texts = [AFTER.format(""), f"{AFTER.format('')} {ANSWER}"]
    asked, (*before, answer) = tokenizer(texts, add_special_tokens=False).input_ids
    if asked != before or len(tokenizer) > vocabulary:
        raise RewardError(
            f"{field}={name!r}: its tokenizer ({len(tokenizer)} tokens) does not fit the model ({vocabulary} tokens, "
            f"one of them for {ANSWER!r})"
        )
    return tokenizer, torch.tensor([answer, tokenizer.eos_token_id])
