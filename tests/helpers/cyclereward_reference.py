"""Runs the cyclereward package's own scoring: `python -m tests.helpers.cyclereward_reference PACKAGES FOLDER`.

PACKAGES holds REQUIREMENTS. FOLDER is as for imagereward_reference.py, with CycleReward.pth.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from tests.helpers import imagereward_reference
from tests.helpers.aside import load_torchvision

REQUIREMENTS = ("cyclereward==0.1.7", *imagereward_reference.REQUIREMENTS[1:])


def build(state):
    """The package's model, scaled down to the sizes of a checkpoint; every weight must find its place."""
    load_torchvision()
    imagereward_reference.stand_in_for_fairscale()
    package = importlib.import_module("cyclereward.model")
    blip, vit = (importlib.import_module(f"cyclereward.blip.{name}") for name in ("blip_pretrain", "vit"))
    package.cyclereward_args |= {"mlp_dim": imagereward_reference.scale_down(state, blip, vit), "blip_path": ""}
    model = package.CycleReward(med_config="med_config.json").eval()
    model.load_state_dict(state)
    return model


def main(packages, folder):
    sys.path.insert(0, packages)
    torch.set_num_threads(1)
    os.chdir(folder)
    model = build(torch.load("CycleReward.pth"))
    request = json.loads(Path("request.json").read_text())
    pixels = [model.preprocess(Image.open(name)) for name in request["pictures"]]
    options = {"padding": "max_length", "truncation": True, "max_length": model.max_length, "return_tensors": "pt"}
    tokens = model.blip.tokenizer(request["prompts"] + request["texts"], **options)
    square = torch.stack(pixels[:2]).requires_grad_()
    score = type(model).score.__wrapped__  # without its torch.no_grad
    answers = {
        "scores": torch.stack(
            [model.score(one[None], prompt)[0, 0] for one, prompt in zip(pixels, request["prompts"], strict=True)]
        ),
        "pixels": pixels,
        "tokens": tokens.input_ids,
        "gradient": torch.autograd.grad(score(model, square, request["prompts"][:2]).sum(), square)[0],
    }
    torch.save(answers, "answers.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
