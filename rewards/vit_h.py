"""The CLIP ViT-H/14 (arXiv 2212.07143) under HPSv2 and MPS, built from a checkpoint's weights alone."""

import re
from collections.abc import Mapping

import torch

from rewards.errors import RewardError
from rewards.files import check_weights

SIZES_OF = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # a model in transformers' format, of the checkpoints' sizes

# The widths of the attention heads. The shapes in a checkpoint do not tell them.
VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH = 80, 64


def load_vit_h(weights: Mapping[str, torch.Tensor], source: str, layout: str):
    """Builds the CLIPModel of weights under transformers' names, which may have fewer layers or less width.

    Args:
        source, layout: The checkpoint and the layout to name in an error.

    Raises:
        RewardError: A weight is missing, unknown or of another shape.
    """
    from transformers import CLIPModel

    config = vit_h_config(weights, source, layout)
    with torch.device("meta"):
        check_weights(weights, CLIPModel(config), source, layout)
    return CLIPModel.from_pretrained(None, config=config, state_dict=dict(weights))


def vit_h_config(weights: Mapping[str, torch.Tensor], source: str, layout: str):
    """Returns the CLIPConfig of the weights. Raises a RewardError if they have another layout."""
    from transformers import CLIPConfig

    try:
        vision_width, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
        patches = len(weights["vision_model.embeddings.position_embedding.weight"]) - 1
        vocabulary, text_width = weights["text_model.embeddings.token_embedding.weight"].shape
        projection_dim = len(weights["text_projection.weight"])
        context = len(weights["text_model.embeddings.position_embedding.weight"])
        mlps = [len(weights[f"{tower}.encoder.layers.0.mlp.fc1.bias"]) for tower in ("vision_model", "text_model")]
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise RewardError(f"{source} is not in {layout} layout: no usable {error}") from error
    if vision_width % VISION_HEAD_WIDTH or text_width % TEXT_HEAD_WIDTH:
        raise RewardError(
            f"{source}: towers {vision_width} and {text_width} wide are not ViT-H-14's, whose attention heads are "
            f"{VISION_HEAD_WIDTH} and {TEXT_HEAD_WIDTH} wide"
        )
    shared = dict(hidden_act="gelu", layer_norm_eps=1e-5, projection_dim=projection_dim)
    vision = dict(
        hidden_size=vision_width, intermediate_size=mlps[0], num_hidden_layers=_depth(weights, "vision_model"),
        num_attention_heads=vision_width // VISION_HEAD_WIDTH, patch_size=patch,
        image_size=patch * round(patches**0.5),
    )  # fmt: skip
    text = dict(
        hidden_size=text_width, intermediate_size=mlps[1], num_hidden_layers=_depth(weights, "text_model"),
        num_attention_heads=text_width // TEXT_HEAD_WIDTH, vocab_size=vocabulary, max_position_embeddings=context,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=0,
    )  # fmt: skip
    return CLIPConfig(projection_dim=projection_dim, vision_config=vision | shared, text_config=text | shared)


def _depth(weights: Mapping[str, torch.Tensor], tower: str) -> int:
    layers = (re.fullmatch(rf"{tower}\.encoder\.layers\.\d+\.layer_norm1\.bias", name) for name in weights)
    return sum(layer is not None for layer in layers)
