"""The language model of CLIP-FlanT5 with its projection. This file loads transformers' T5, so it is imported late."""

from typing import ClassVar

from torch import nn
from transformers import T5ForConditionalGeneration


class ClipT5(T5ForConditionalGeneration):
    """A T5 with a projection of CLIP's states, under the names of the released files.

    The configuration is T5's, and has the width of CLIP as `mm_hidden_size`.
    """

    # transformers also ties the output layer, whatever the configuration says. FlanT5 has weights of its own there.
    _tied_weights_keys: ClassVar = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    # A second name of the embeddings, and the CLIP, which is loaded from its own files.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^embed_tokens\.", r"^vision_tower\."]

    def __init__(self, config):
        super().__init__(config)
        width = config.d_model
        self.mm_projector = nn.Sequential(nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width))
