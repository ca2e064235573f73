"""Runs the image-reward package's own scoring: `python -m tests.helpers.imagereward_reference PACKAGES FOLDER`.

PACKAGES holds REQUIREMENTS: the package and the old transformers and timm that it was written for. FOLDER holds
request.json (prompts, picture names, further texts), ImageReward.pt and `bert-base-uncased`, the name under which
the package asks for its tokenizer.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path

import torch
from PIL import Image

from tests.helpers.aside import load_torchvision

REQUIREMENTS = (
    "image-reward==1.5",
    "timm==0.6.13",  # the version that it pins
    "transformers==4.27.4",  # the oldest that it allows; with a newer one its modules do not import
    "tokenizers==0.13.3",
    "huggingface_hub==0.13.4",
    "torchvision==0.28.0",
)
TEXT = {  # BLIP's med_config.json but for the sizes
    "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
    "layer_norm_eps": 1e-12, "pad_token_id": 0, "add_type_embeddings": False, "add_cross_attention": True,
}  # fmt: skip


def stand_in_for_fairscale():
    """Of fairscale, which has no wheel, only activation checkpointing is imported, and never called."""
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        sys.modules[name] = types.ModuleType(name)
    checkpointing = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    checkpointing.checkpoint_wrapper = None
    sys.modules[checkpointing.__name__] = checkpointing


def import_package(packages: str):
    """`ImageReward.ImageReward`, without the package's __init__, which imports everything that trains."""
    load_torchvision()
    stand_in_for_fairscale()
    for name in ("ImageReward", "ImageReward.models"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [f"{packages}/{name.replace('.', '/')}"]
    return importlib.import_module("ImageReward.ImageReward")


def scale_down(state, blip, vit) -> int:
    """Writes med_config.json and makes `blip.create_vit` build towers of a checkpoint's sizes.

    blip, vit: a package's modules. Returns the width of the text encoder.
    """
    vision = state["blip.visual_encoder.cls_token"].shape[-1]
    vocabulary, text = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
    sizes = {
        "vocab_size": vocabulary, "hidden_size": text, "num_attention_heads": text // 64,
        "num_hidden_layers": sum(n.endswith("crossattention.self.query.bias") for n in state),
        "intermediate_size": len(state["blip.text_encoder.encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(state["blip.text_encoder.embeddings.position_embeddings.weight"]),
    }  # fmt: skip
    Path("med_config.json").write_text(json.dumps(TEXT | sizes))
    depth = sum(n.endswith("attn.qkv.bias") for n in state)
    ratio = len(state["blip.visual_encoder.blocks.0.mlp.fc1.bias"]) / vision
    blip.create_vit = lambda kind, image_size, *rest: (
        vit.VisionTransformer(
            img_size=image_size, embed_dim=vision, depth=depth, num_heads=vision // 64, mlp_ratio=ratio
        ),
        vision,
    )
    return text


def build(package, state):
    """The package's model, scaled down to the sizes of a checkpoint; every weight must find its place."""
    blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    head, text = package.MLP, scale_down(state, blip, importlib.import_module("ImageReward.models.BLIP.vit"))
    package.MLP = lambda width: head(text)
    model = package.ImageReward(med_config="med_config.json").eval()
    model.load_state_dict(state)
    return model


def main(packages, folder):
    sys.path.insert(0, packages)
    torch.set_num_threads(1)
    os.chdir(folder)
    model = build(import_package(packages), torch.load("ImageReward.pt"))
    request = json.loads(Path("request.json").read_text())
    pictures = [Image.open(name) for name in request["pictures"]]
    pixels = [model.preprocess(picture) for picture in pictures]
    options = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}
    tokens = model.blip.tokenizer(request["prompts"] + request["texts"], **options)
    square = torch.stack(pixels[:2]).requires_grad_()
    scores = model.score_gard(tokens.input_ids[:2], tokens.attention_mask[:2], square)
    answers = {
        "scores": torch.tensor([model.score(*pair) for pair in zip(request["prompts"], pictures, strict=True)]),
        "pixels": pixels,
        "tokens": tokens.input_ids,
        "gradient": torch.autograd.grad(scores.sum(), square)[0],
    }
    torch.save(answers, "answers.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
