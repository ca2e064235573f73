"""BLIP (arXiv 2201.12086) with a head that scores pictures for their prompts, as in ImageReward and CycleReward."""

import copy
import os
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError
from rewards.files import check_weights, load_weights, read_tokenizer
from rewards.heads import AestheticHead
from rewards.preprocess import TorchvisionPreprocess
from rewards.skeleton import blank
from rewards.towers import DTYPES

SIZES_OF = "THUDM/ImageReward"  # the sizes of this model are bundled; CycleReward's are the same
HEAD_WIDTH = 64  # of the attention heads in both of BLIP's towers; the shapes in a checkpoint do not tell it

# BLIP's own names after "blip.", and transformers' names for the same weights. The text encoder has the same names.
RENAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
# The file holds these, but the score does not use them: BLIP's contrastive projections, and a table of 0, 1, 2, …
UNUSED = re.compile(r"(vision|text)_proj\.(weight|bias)|text_encoder\.embeddings\.position_ids")


class BlipReward(Reward):
    """A head on the first token of BLIP. Subclasses have the constructor and the attributes.

    Attributes:
        group: The group of the reward's options, which errors name.
        head_kind: The class of the head.
        prompt_length: The number of tokens of every prompt, including the first and the last special token.
    """

    plannable = True
    group: str
    head_kind: type[AestheticHead]
    prompt_length: int

    def load(self, path: str | os.PathLike, tokenizer: str, dtype: str) -> None:
        """Loads a checkpoint with the weights "blip.…" and "mlp.layers.…".

        Raises:
            RewardError: A file is missing or does not fit.
        """
        source = f"{self.group}.checkpoint={str(path)!r}"
        blip, head = split_checkpoint(load_weights(path, f"{self.group}.checkpoint"), source)
        self.head = self.head_kind.from_weights(head, source)
        self.blip = load_blip(blip, tokenizer, dtype, self.prompt_length, source, f"{self.group}.tokenizer")
        wanted, width = self.head.layers[0].in_features, self.blip.text_encoder.config.hidden_size
        if wanted != width:
            raise RewardError(f"{source}: its head wants {wanted} numbers, its text encoder gives {width}")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        from transformers import BlipTextConfig, BlipVisionConfig

        reward = blank(cls)
        config = copy.deepcopy(tower_config(SIZES_OF, f"{cls.group}.checkpoint", "blip"))
        vision, text = BlipVisionConfig(**config["vision_config"]), BlipTextConfig(**config["text_config"])
        with torch.device("meta"):
            reward.blip = _BlankBlip(*build_blip(vision, text), cls.prompt_length, dtype=options["dtype"])
        reward.head = cls.head_kind.without_data(text.hidden_size)
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.head(self.blip(images, prompts))


class BlipTower(nn.Module):
    """BLIP's image-grounded text encoder, frozen: a BERT that looks at the picture through cross-attention.

    Args:
        vision_model: transformers' BlipVisionModel.
        text_encoder: transformers' BlipTextModel.
        prompt_length: The number of tokens of every prompt.
        dtype: The precision of both, a key of DTYPES (towers.py).
    """

    def __init__(
        self, vision_model: nn.Module, text_encoder: nn.Module, prompt_length: int, tokenizer=None,
        dtype: str = "float32",
    ):  # fmt: skip
        super().__init__()
        self.dtype = DTYPES[dtype]
        self.vision_model = vision_model.to(self.dtype).requires_grad_(False).eval()
        self.text_encoder = text_encoder.to(self.dtype).requires_grad_(False).eval()
        self.preprocess = TorchvisionPreprocess(vision_model.config.image_size)
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the first token's states [B, D] float32, given images [B, 3, H, W] in [0, 1]; differentiable."""
        patches = self.vision_model(pixel_values=self.preprocess(images).to(self.dtype)).last_hidden_state
        tokens, mask = (tensor.to(images.device) for tensor in self.tokenize(prompts))
        # This mask is added to the attention's logits. Given a mask of ones and zeros, transformers looks at the values
        # first. That waits for the GPU, and there are no values while memory is planned.
        mask = (1 - mask[:, None, None].to(self.dtype)) * torch.finfo(self.dtype).min
        states = self.text_encoder(input_ids=tokens, attention_mask=mask, encoder_hidden_states=patches)
        return states.last_hidden_state[:, 0].float()

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token ids [B, L] int64, cut or padded to prompt_length, and a mask [B, L] that is 0 for padding."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.prompt_length, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask


class _BlankBlip(BlipTower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(prompts), self.prompt_length, dtype=torch.long, device="meta")
        return tokens, tokens


def split_checkpoint(weights: Mapping[str, torch.Tensor], source: str) -> tuple[dict, dict]:
    """Splits a checkpoint into BLIP's weights, under transformers' names and without unused ones, and the head's.

    Raises:
        RewardError: A weight belongs to neither.
    """
    blip, head = {}, {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        if part not in ("blip", "mlp"):
            raise RewardError(f"{source} is not in BLIP's layout: unknown {name!r}")
        if part == "mlp":
            head[rest] = weight
        elif not UNUSED.fullmatch(rest):
            blip[next((re.sub(old, new, rest) for old, new in RENAMES if re.match(old, rest)), rest)] = weight
    return blip, head


def load_blip(
    weights: Mapping[str, torch.Tensor], tokenizer: str, dtype: str, prompt_length: int, source: str, field: str
) -> BlipTower:
    """Builds the towers, of any size, from the BLIP weights that `split_checkpoint` returns.

    Args:
        source: The checkpoint to name in an error.
        field: The option to name in an error about the tokenizer.

    Raises:
        RewardError: There are too many or too few weights, or they have other shapes, or the tokenizer does not fit.
    """
    from transformers import BlipTextModel, BlipVisionModel

    vision_config, text_config = configs_of(weights, source)
    with torch.device("meta"):
        shapes = BlipTower(*build_blip(vision_config, text_config), prompt_length)
    check_weights(weights, shapes, source, "BLIP's")
    words = load_bert_tokenizer(tokenizer, text_config.vocab_size, field)
    vision, text = (
        {name.removeprefix(part): weight for name, weight in weights.items() if name.startswith(part)}
        for part in ("vision_model.", "text_encoder.")
    )
    vision_model = BlipVisionModel.from_pretrained(None, config=vision_config, state_dict=vision)
    text_encoder = BlipTextModel.from_pretrained(None, config=text_config, state_dict=text, add_pooling_layer=False)
    return BlipTower(vision_model, text_encoder, prompt_length, words, dtype)


def build_blip(vision_config, text_config) -> tuple[nn.Module, nn.Module]:
    """Returns (BlipVisionModel, BlipTextModel) with fresh weights."""
    from transformers import BlipTextModel, BlipVisionModel

    return BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)


def configs_of(weights: Mapping[str, torch.Tensor], source: str) -> tuple:
    """Returns the (BlipVisionConfig, BlipTextConfig) of the weights. Raises a RewardError for another layout."""
    from transformers import BlipTextConfig, BlipVisionConfig

    try:
        vision_width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
        patches = weights["vision_model.embeddings.position_embedding"].shape[1] - 1
        vision_mlp = len(weights["vision_model.encoder.layers.0.mlp.fc1.bias"])
        vocabulary, text_width = weights["text_encoder.embeddings.word_embeddings.weight"].shape
        positions = len(weights["text_encoder.embeddings.position_embeddings.weight"])
        text_mlp = len(weights["text_encoder.encoder.layer.0.intermediate.dense.bias"])
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise RewardError(f"{source} is not in BLIP's layout: no usable {error}") from error
    if vision_width % HEAD_WIDTH or text_width % HEAD_WIDTH:
        raise RewardError(
            f"{source}: towers {vision_width} and {text_width} wide are not BLIP's, whose attention heads are "
            f"{HEAD_WIDTH} wide"
        )
    return (
        BlipVisionConfig(
            hidden_size=vision_width, intermediate_size=vision_mlp, num_attention_heads=vision_width // HEAD_WIDTH,
            num_hidden_layers=_depth(weights, r"vision_model\.encoder\.layers"), patch_size=patch,
            image_size=patch * round(patches**0.5), hidden_act="gelu", layer_norm_eps=1e-6,
        ),
        BlipTextConfig(
            vocab_size=vocabulary, max_position_embeddings=positions, hidden_size=text_width,
            encoder_hidden_size=vision_width, intermediate_size=text_mlp, num_attention_heads=text_width // HEAD_WIDTH,
            num_hidden_layers=_depth(weights, r"text_encoder\.encoder\.layer"), hidden_act="gelu",
            layer_norm_eps=1e-12, is_decoder=True, bos_token_id=vocabulary - 2,
        ),
    )  # fmt: skip


def _depth(weights: Mapping[str, torch.Tensor], layers: str) -> int:
    matches = [re.match(rf"{layers}\.(\d+)\.", name) for name in weights]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def load_bert_tokenizer(name: str, vocab_size: int, field: str):
    """Loads uncased BERT's tokenizer and adds BLIP's [DEC] and [ENC] at the end of its vocabulary.

    Raises:
        RewardError: It cannot be loaded, or does not have `vocab_size` tokens.
    """
    from transformers import AddedToken, BertTokenizer

    tokenizer = read_tokenizer(BertTokenizer, name, None, "BERT", field)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens([AddedToken("[ENC]", special=True)], special_tokens=True)
    if len(tokenizer) != vocab_size:
        raise RewardError(
            f"{field}={name!r}: its {len(tokenizer)} tokens, with BLIP's two, do not fit the text "
            f"encoder's {vocab_size}"
        )
    return tokenizer
