"""The `hps` reward against the hpsv2 package's own scoring of PIL images, with the same random weights.

The package is installed aside, once, in the git-ignored `work/hpsv2_reference` (about 40 MB from PyPI), and run in a
process of its own on the CPU, so in float32 (on a GPU it scores under fp16 autocast). With one sample per picture:
no resize, downscaling, upscaling, and pictures that are not square.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from PIL import Image

from rewards import build_reward
from tests.reward_files import open_clip_state

ROOT = Path(__file__).resolve().parent.parent
SIDES = [(224, 224), (224, 224), (512, 512), (64, 64), (300, 200), (157, 401)]  # height, width
PROMPTS = [
    "a red cat",
    "two dogs on a sofa",
    "The artist’s “blue” horse, trending on ArtStation, 8k!!",
    "salt &amp;amp; pepper; cafÃ© 1984 -- naïve 猫 🐈",
    "very long " * 60,
    "don't stop, it's we'll they'd",
]
# More prompts for the tokenizer alone: whitespace, accents, digits, empty, case.
TEXTS = [
    "",
    "  tabs\tand\nlines  ",
    "ÀÉÎ Straße ΣΊΣΥΦΟΣ",
    "12345 3.14",
    "a_b-c/d\\e",
    "½ﬁ①",
    "e\u0301 vs é",
    "'S 'T",
    "1 < 2 &amp;amp; 3",
]
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 320, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3},
}


def installed_packages() -> Path:
    """Where the hpsv2 package lies, after installing it if that was not done with today's requirements."""
    target = ROOT / "work" / "hpsv2_reference"
    script = ROOT / "scripts" / "install_hps.sh"
    target.parent.mkdir(exist_ok=True)
    stamp, recipe = target / "installed.txt", script.read_text() + (ROOT / "requirements-hps.txt").read_text()
    with filelock.FileLock(f"{target}.lock"):
        if not stamp.is_file() or stamp.read_text() != recipe:
            shutil.rmtree(target, ignore_errors=True)
            run(["bash", str(script), "--target", str(target)], os.environ | {"PYTHON": sys.executable})
            stamp.write_text(recipe)
    return target


def run(command, environment):
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What the package answers, its images, and the `hps` options for the same files."""
    folder = tmp_path_factory.mktemp("hps_reference")
    names, images = [], []
    for i, (height, width) in enumerate(SIDES):
        generator = torch.Generator().manual_seed(i)
        coarse = torch.rand(1, 3, 6, 8, generator=generator)
        picture = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
        array = (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
        names.append(f"picture_{i}.png")
        Image.fromarray(array.numpy()).save(folder / names[-1])
        images.append(array.permute(2, 0, 1).unsqueeze(0).float() / 255)
    (folder / "request.json").write_text(
        json.dumps({"pictures": names, "prompts": PROMPTS, "texts": TEXTS, "model": MODEL})
    )
    torch.save(images, folder / "images.pt")
    state = open_clip_state(layers=(3, 3), widths=(320, 256))
    torch.save({"state_dict": state}, folder / "checkpoint.pt")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run([sys.executable, "-m", "tests.hps_reference", str(installed_packages()), str(folder)], environment)
    options = {"checkpoint": str(folder / "checkpoint.pt"), "tokenizer": str(folder / "tokenizer")}
    return torch.load(folder / "answers.pt"), images, options


@pytest.fixture(scope="module")
def reward(reference):
    return build_reward("hps", {"hps": reference[2]})


def ours(reward, images):
    with torch.no_grad():
        return torch.cat([reward(image, [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])


def test_score_equals_the_packages_score_of_a_pil_image(reference, reward):
    answers, images, _ = reference
    scores = ours(reward, images)
    assert answers["scores"].std() > 0.02  # the weights tell the samples apart, far above the tolerance
    # float32 rounding alone, resized or not: the package resizes float tensors, as this does, never 8-bit pixels.
    torch.testing.assert_close(scores, answers["scores"], atol=1e-6, rtol=0)


def test_score_of_the_hpsv2_backend_is_the_same(reference):
    answers = reference[0]
    torch.testing.assert_close(answers["backend_scores"], answers["scores"], atol=1e-6, rtol=0)


def test_pixels_equal_the_packages(reference, reward):
    answers, images, _ = reference
    preprocess = reward.terms["hps"].tower.preprocess
    differences = [
        (preprocess(image)[0] - pixels).abs().max().item()
        for image, pixels in zip(images, answers["pixels"], strict=True)
    ]
    assert max(differences) < 1e-6, differences


def test_tokens_equal_the_packages(reference, reward):
    assert torch.equal(reward.terms["hps"].tower.tokenize(PROMPTS + TEXTS), reference[0]["tokens"])


def test_gradient_equals_the_packages(reference, reward):
    answers, images, _ = reference
    square = torch.cat(images[:2]).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(square, PROMPTS[:2]).sum(), square)
    # The package's is with respect to normalised pixels.
    expected = answers["gradient"] / reward.terms["hps"].tower.preprocess.std
    assert (gradient - expected).norm() / expected.norm() < 1e-5
