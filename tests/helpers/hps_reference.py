"""Runs the hpsv2 package's own scoring: `python -m tests.helpers.hps_reference PACKAGES FOLDER`.

PACKAGES is where scripts/install_hps.sh put hpsv2. FOLDER holds request.json (prompts, picture names, the sizes of
a scaled-down ViT-H-14) and checkpoint.pt; the answers are written beside them. A process of its own, because
torchvision must not be importable where transformers and diffusers run beside a CPU build of torch.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from tests.helpers.aside import load_torchvision


def score_with_hpsv2(folder, request):
    """The package's `score` of every PIL picture with its prompt, by a scaled-down model."""
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    factory._MODEL_CONFIGS["ViT-H-14"] = request["model"]
    # What img_score.initialize_model does, less its download of the weights that a checkpoint then replaces.
    model, _, preprocess = factory.create_model_and_transforms(
        "ViT-H-14", None, precision="amp", device="cpu", light_augmentation=True, output_dict=True
    )
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    pictures = [Image.open(folder / name) for name in request["pictures"]]
    scores = [
        float(img_score.score(picture, prompt, cp=str(folder / "checkpoint.pt"))[0])
        for picture, prompt in zip(pictures, request["prompts"], strict=True)
    ]
    return scores, [preprocess(picture) for picture in pictures], model


def gradient_of(model, pixels, tokens):
    """∂ Σ score / ∂ pixels of the package's own forward."""
    pixels = pixels.clone().requires_grad_()
    output = model(pixels, tokens)
    score = (output["image_features"] * output["text_features"]).sum()
    return torch.autograd.grad(score, pixels)[0]


def save_tokenizer(folder):
    """The package's vocabulary as the CLIPTokenizer folder that hub repositories of CLIP hold."""
    from hpsv2.src.open_clip.tokenizer import _tokenizer
    from transformers import CLIPTokenizer

    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in _tokenizer.encoder.items()}
    merges = sorted(_tokenizer.bpe_ranks, key=_tokenizer.bpe_ranks.get)
    CLIPTokenizer(vocabulary, merges).save_pretrained(folder)


def main(packages, folder):
    sys.path.insert(0, packages)
    torch.set_num_threads(1)
    load_torchvision()
    folder = Path(folder)
    request = json.loads((folder / "request.json").read_text())
    scores, pixels, model = score_with_hpsv2(folder, request)

    from hpsv2.src.open_clip import get_tokenizer

    from rewards import build_reward

    tokens = get_tokenizer("ViT-H-14")(request["prompts"] + request["texts"])
    square = torch.stack(pixels)[:2]
    images = torch.load(folder / "images.pt")
    package_reward = build_reward("hps", {"hps": {"backend": "hpsv2", "checkpoint": str(folder / "checkpoint.pt")}})
    answers = {
        "scores": torch.tensor(scores),
        "pixels": pixels,
        "tokens": tokens,
        "gradient": gradient_of(model, square, tokens[:2]),
        "backend_scores": torch.cat(
            [package_reward(image, [prompt]) for image, prompt in zip(images, request["prompts"], strict=True)]
        ).detach(),
    }
    torch.save(answers, folder / "answers.pt")
    save_tokenizer(folder / "tokenizer")


if __name__ == "__main__":
    main(*sys.argv[1:])
