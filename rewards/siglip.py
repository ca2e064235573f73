"""SigLIP (arXiv 2303.15343) and SigLIP 2 (2502.14786): image-text similarity learnt with a sigmoid loss."""

import copy
import json
import os
import string
from collections.abc import Callable, Mapping, Sequence

import torch

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError, first_line
from rewards.files import find_file, load_whole, model_type
from rewards.preprocess import SquashPreprocess
from rewards.registry import Precision
from rewards.skeleton import BlankTokens, blank
from rewards.towers import ClipTower, load_preprocess

PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipReward(Reward):
    """Cosine of image and prompt, in [-1, 1]; about 0.05 to 0.2 for a picture of its prompt.

    The model's own probability that image and prompt belong together is sigmoid(scale · cosine + bias), with a scale of
    about 100. It increases with the cosine, and saturates.

    Args:
        model: The hub name or folder of a SigLIP, or of a SigLIP 2 of a fixed resolution.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of the towers. A lower one disturbs the gradient.

    Raises:
        RewardError: The model cannot be loaded, or is not a SigLIP.
    """

    plannable = True

    def __init__(
        self, model: str = "google/siglip-base-patch16-224", revision: str | None = None, dtype: Precision = "float32"
    ):
        super().__init__()
        self.tower = load_siglip(model, revision, dtype, field="siglip.model")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        reward.tower = blank_siglip(tower_config(options["model"], "siglip.model", "siglip"), options["dtype"])
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.tower.similarity(images, prompts)


class SiglipTower(ClipTower):
    """A frozen `transformers.SiglipModel`. Its pooled states are the embeddings, without a projection.

    Args:
        clean: Changes a prompt before it goes to the tokenizer.
    """

    def __init__(self, model, preprocess, tokenizer=None, dtype: str = "float32", clean: Callable[[str], str] = str):
        super().__init__(model, preprocess, tokenizer, dtype)
        self.clean = clean

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.vision_model(pixel_values=pixels).pooler_output

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        # No attention mask: the tower was trained to see the padding and to be read at the last position.
        return self.model.text_model(input_ids=tokens).pooler_output

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Returns token ids [B, L] int64, padded to the text tower's length (64). Each text has an end token."""
        return self.tokenizer(
            [self.clean(prompt) for prompt in prompts], padding="max_length", padding_side="right", truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt",
        ).input_ids  # fmt: skip


class _BlankSiglip(BlankTokens, SiglipTower):
    pass


def blank_siglip(config: dict, dtype: str, with_text: bool = True) -> SiglipTower:
    """Returns a SigLIP of that configuration without weights, which takes every prompt as one of full length."""
    from transformers import SiglipConfig, SiglipModel

    with torch.device("meta"):
        model = SiglipModel(SiglipConfig(**copy.deepcopy(config)))
    if not with_text:
        del model.text_model
    return _BlankSiglip(model, SquashPreprocess(model.config.vision_config.image_size), dtype=dtype)


def load_siglip(name: str, revision: str | None, dtype: str, field: str, with_text: bool = True) -> SiglipTower:
    """Loads the SigLIP `name`: a hub name ("google/siglip-base-patch16-224") or a folder written by `save_pretrained`.

    Args:
        field: The option to name in an error.
        with_text: Load the tokenizer and the text tower as well.

    Raises:
        RewardError: It cannot be found, is not a SigLIP, lacks weights, or its tokenizer belongs to another model.
    """
    from transformers import SiglipModel

    name = os.path.expanduser(name)
    kind = model_type(name, revision, field)
    if kind != "siglip":
        naflex = ", which takes pictures of any shape; use one of a fixed size, as google/siglip2-base-patch16-224"
        raise RewardError(
            f"{field}={name!r} is a {kind!r} model{naflex if kind == 'siglip2' else ''}; expected 'siglip'"
        )
    model = load_whole(SiglipModel, name, revision, "SigLIP", field)
    preprocess = load_preprocess(SquashPreprocess, name, revision, model.config.vision_config.image_size, field)
    if not with_text:
        del model.text_model
        return SiglipTower(model, preprocess, dtype=dtype)
    tokenizer, clean = load_siglip_tokenizer(name, revision, field)
    vocabulary = model.config.text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise RewardError(
            f"{field}={name!r}: its tokenizer ({len(tokenizer)} tokens) does not fit the text tower ({vocabulary})"
        )
    return SiglipTower(model, preprocess, tokenizer, dtype, clean)


def load_siglip_tokenizer(name: str, revision: str | None, field: str) -> tuple[Callable, Callable[[str], str]]:
    """Returns (tokenizer, function that cleans a prompt before the tokenizer).

    SigLIP's tokenizer is made from its spiece.model, SigLIP 2's from its tokenizer.json.

    Raises:
        RewardError: A file is missing or damaged.
    """
    from transformers import Siglip2Tokenizer

    config = find_file(name, "tokenizer_config.json", revision, field).read_text()
    try:
        if json.loads(config).get("tokenizer_class") == "SiglipTokenizer":
            return unigram_tokenizer(find_file(name, "spiece.model", revision, field).read_bytes()), canonical
        # The file mostly names Gemma's class, because the vocabulary is Gemma's. Siglip2Tokenizer also lowers the case.
        find_file(name, "tokenizer.json", revision, field)
        return Siglip2Tokenizer.from_pretrained(name, revision=revision or "main"), str
    except RewardError:
        raise
    except Exception as error:  # json, protobuf and tokenizers raise their own for a damaged file
        raise RewardError(f"{field}={name!r} holds no usable SigLIP tokenizer: {first_line(error)}") from error


def canonical(prompt: str) -> str:
    """Cleans a prompt as SigLIP's training texts were cleaned: lower case, no ASCII punctuation, single spaces."""
    return " ".join(prompt.lower().translate(PUNCTUATION).split())


def unigram_tokenizer(sentencepiece_model: bytes):
    """Builds the tokenizer of a sentencepiece unigram model without the sentencepiece package.

    transformers' own SiglipTokenizer needs that package. The file's vocabulary, scores and character map suffice here.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import import_protobuf

    file = import_protobuf().ModelProto()
    file.ParseFromString(sentencepiece_model)
    pieces = [(piece.piece, piece.score) for piece in file.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=file.trainer_spec.unk_id))
    characters = file.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Precompiled(characters)] if characters else [])
        + [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    end = tokenizer.token_to_id("</s>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>")
