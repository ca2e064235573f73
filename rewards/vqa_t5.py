"""VQAScore on CLIP-FlanT5 (arXiv 2404.01291): FlanT5's encoder reads CLIP's patches and the question."""

import copy
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rewards.base import TowerConfig
from rewards.errors import RewardError, first_line
from rewards.files import load_whole, read_tokenizer
from rewards.skeleton import blank_clip_model
from rewards.towers import DTYPES, load_clip
from rewards.vqa_clip import AFTER, ANSWER, BEFORE, ClipVQATower, SquarePreprocess, blank_tokens

TOKENIZER = "google/flan-t5-xl"  # All sizes of FlanT5 have the same one.
ALLOWED = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
LAYER = "mm_vision_select_layer"


class ClipT5Tower(ClipVQATower):
    """CLIP-FlanT5: the encoder reads the patches among the words, and the decoder says Yes and then the end token.

    Args:
        model: A ClipT5 (clip_t5.py).
        vision: See `ClipVQATower`, as all other arguments.
    """

    def __init__(self, model, vision, preprocess, tokenizer, answer, vocabulary, dtype: str = "bfloat16"):
        blocks = [*model.encoder.block, *model.decoder.block]
        layer = getattr(model.config, LAYER)
        super().__init__(model, vision, layer, blocks, preprocess, tokenizer, answer, vocabulary, dtype)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        return self.model.mm_projector(states)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.shared(tokens)

    def spell(self, prompts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        # Both texts have an end token of their own, as in training.
        return self.tokenizer(BEFORE).input_ids, self.tokenizer([AFTER.format(text) for text in prompts]).input_ids

    def answer_logits(self, words: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        # transformers looks at the values of a mask, and tensors on the meta device have none.
        mask = None if words.is_meta else (places < length[:, None]).long()
        # T5's decoder begins with the padding token.
        right = nn.functional.pad(self.answer[:-1], (1, 0), value=self.model.config.pad_token_id)
        right = right.expand(len(words), -1)
        return self.model(inputs_embeds=words, attention_mask=mask, decoder_input_ids=right, use_cache=False).logits


class _BlankTower(ClipT5Tower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return blank_tokens(prompts)


def load_clip_t5(
    name: str, revision: str | None, facts: Mapping, tokenizer: str | None, dtype: str, field: str
) -> ClipT5Tower:
    """Loads the CLIP-FlanT5 of a hub name or folder. The arguments are those of `Family.load` (vqascore.py).

    The folder has a T5 with the projection. Its config.json names the CLIP, which is loaded from there.

    Raises:
        RewardError: Something cannot be loaded, or does not fit the rest.
    """
    from rewards.clip_t5 import ClipT5

    config = clip_t5_config(facts, f"{field}={name!r}")
    clip = load_clip(
        config.mm_vision_tower, None, dtype, False, f"{field}={name!r}: mm_vision_tower", preprocess=SquarePreprocess
    )
    vision = clip.model.vision_model
    check_vision(config, vision.config, f"{field}={name!r}")
    name = os.path.expanduser(name)
    model = load_whole(ClipT5, name, revision, "CLIP-FlanT5", field, config=config, dtype=DTYPES[dtype])
    words, answer = load_t5_tokenizer(tokenizer or TOKENIZER, config.vocab_size, "vqascore.tokenizer")
    return ClipT5Tower(model, vision, clip.preprocess, words, answer, len(words), dtype)


def blank_clip_t5(facts: Mapping, tower_config: TowerConfig, dtype: str, field: str) -> ClipT5Tower:
    """Returns a CLIP-FlanT5 on the meta device. The arguments are those of `Family.blank` (vqascore.py)."""
    from rewards.clip_t5 import ClipT5

    config = clip_t5_config(facts, field)
    vision = blank_clip_model(tower_config(config.mm_vision_tower, f"{field}: mm_vision_tower", "clip")).vision_model
    check_vision(config, vision.config, field)
    with torch.device("meta"):
        model, answer = ClipT5(config), torch.zeros(2, dtype=torch.long)
    preprocess = SquarePreprocess(vision.config.image_size)
    return _BlankTower(model, vision, preprocess, None, answer, config.vocab_size, dtype)


def clip_t5_config(facts: Mapping, source: str):
    """Returns the T5Config of what a config.json says. Raises a RewardError if it is not that of a CLIP-FlanT5."""
    from transformers import T5Config

    if not facts.get("mm_vision_tower"):
        raise RewardError(f"{source} is a T5 without pictures: its config.json has no mm_vision_tower")
    for key, allowed in ALLOWED.items():
        if facts.get(key, allowed) != allowed:
            raise RewardError(f"{source}: {key}={facts[key]!r} is not supported; allowed: {allowed!r}")
    for key in (LAYER, "mm_hidden_size"):
        if not isinstance(facts.get(key), int):
            raise RewardError(f"{source}: {key}={facts.get(key)!r} is no whole number")
    try:
        return T5Config(**copy.deepcopy(dict(facts)))
    except Exception as error:  # wrong types and values fail in many ways
        raise RewardError(f"{source}: its config.json is not that of a T5: {first_line(error)}") from error


def check_vision(config, vision, source: str) -> None:
    """Raises a RewardError if the configuration of a CLIP does not fit that of the CLIP-FlanT5 that reads it."""
    if config.mm_hidden_size != vision.hidden_size:
        raise RewardError(
            f"{source}: mm_hidden_size={config.mm_hidden_size}, but mm_vision_tower={config.mm_vision_tower!r} has "
            f"hidden_size={vision.hidden_size}"
        )
    layer, depth = getattr(config, LAYER), vision.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise RewardError(f"{source}: {LAYER}={layer} is outside of the CLIP's {depth} layers")


def load_t5_tokenizer(name: str, vocabulary: int, field: str) -> tuple:
    """Returns the T5Tokenizer of a hub name or folder, and the tokens [2] of the answer.

    Raises:
        RewardError: There is none, or it does not fit a model with so many tokens.
    """
    from transformers import T5Tokenizer

    tokenizer = read_tokenizer(T5Tokenizer, name, None, "T5", field)
    answer = tokenizer(ANSWER).input_ids
    fits = len(answer) == 2 and answer[1] == tokenizer.eos_token_id and answer[0] != tokenizer.unk_token_id
    if not fits or len(tokenizer) > vocabulary:
        raise RewardError(
            f"{field}={name!r}: its tokenizer ({len(tokenizer)} tokens, {answer} for {ANSWER!r}) does not fit the "
            f"model ({vocabulary} tokens, one token and the end token for {ANSWER!r})"
        )
    return tokenizer, torch.tensor(answer)
