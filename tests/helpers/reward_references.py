"""Each reward beside its reference, with the same random weights: published code, or transformers' own way.

A reference starts from 8-bit PIL pictures and text, with the processor of its own, and ends in scores and their
gradient with respect to its pixels. `CASES` has one function a reward, `compare` what both make of the same.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from rewards import WeightedReward, build_reward
from tests.helpers import aside, cyclereward_reference, imagereward_reference, siglip_reference
from tests.helpers.imagereward_files import CYCLE, imagereward_state, make_bert_tokenizer
from tests.helpers.reward_files import make_options, make_siglip, open_clip_state

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
    "", "  tabs\tand\nlines  ", "ÀÉÎ Straße ΣΊΣΥΦΟΣ", "12345 3.14", "a_b-c/d\\e", "½ﬁ①", "e\u0301 vs é", "'S 'T",
    "1 < 2 &amp;amp; 3",
]  # fmt: skip
HPS_MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 320, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3},
}


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        reward: the reward alone, as built from a spec.
        images: [1, 3, H, W] in [0, 1], one a prompt of PROMPTS; the first two need no resize.
        pixels: the reference's, normalised, [3, h, w] each.
        tokens: ours and the reference's ids of PROMPTS, and of TEXTS where it was asked; None without text.
        scores: the reference's [6].
        gradient: the reference's ∂ Σ scores[:2] / ∂ pixels[:2], [2, 3, h, w].
        answers: all that a reference in another process left.
        metadata: of each picture; None without.
    """

    reward: WeightedReward
    images: list[torch.Tensor]
    pixels: list[torch.Tensor]
    tokens: tuple[torch.Tensor, torch.Tensor] | None
    scores: torch.Tensor
    gradient: torch.Tensor
    answers: dict | None = None
    metadata: list[dict] | None = None

    @property
    def preprocess(self):
        """Makes the pixels of the reward, and has the `std` by which it divides them."""
        (term,) = self.reward.terms.values()
        tower = term.blip if hasattr(term, "blip") else term.tower
        return getattr(tower, "preprocess", AsTheyAre())

    def ours(self, first: int, last: int, images: torch.Tensor) -> torch.Tensor:
        """The scores of the pictures from `first` to before `last`."""
        metadata = None if self.metadata is None else self.metadata[first:last]
        return self.reward(images, PROMPTS[first:last], metadata)


class AsTheyAre:
    """The preprocessing of a reward that has none."""

    std = 1

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images


@dataclass(frozen=True)
class Difference:
    """
    Attributes:
        pixels: largest difference in 1/255, before normalising, of the two pictures that fit.
        resized: share of the pixels of the others that differ by more than a hundredth of 1/255.
        tokens: whether all ids are equal; None without text.
        scores, gradient: relative, of the two pictures that fit.
        resized_scores: relative to the scores' own spread, of all pictures.
    """

    pixels: float
    resized: float
    tokens: bool | None
    scores: float
    gradient: float
    resized_scores: float


def compare(case: Case) -> Difference:
    preprocess = case.preprocess
    steps = [
        ((preprocess(image)[0] - pixels) * preprocess.std * 255).abs().flatten()
        for image, pixels in zip(case.images, case.pixels, strict=True)
    ]
    with torch.no_grad():
        scores = torch.cat([case.ours(i, i + 1, image) for i, image in enumerate(case.images)])
    fitting = torch.cat(case.images[:2]).requires_grad_()
    (gradient,) = torch.autograd.grad(case.ours(0, 2, fitting).sum(), fitting)
    expected = case.gradient / preprocess.std  # the reference's is with respect to normalised pixels
    assert scores.dtype == torch.float32
    error = scores - case.scores
    return Difference(
        pixels=torch.cat(steps[:2]).max().item(),
        resized=(torch.cat(steps[2:]) > 0.01).float().mean().item(),
        tokens=None if case.tokens is None else torch.equal(*case.tokens),
        scores=(error[:2].abs().max() / case.scores[:2].abs().max()).item(),
        gradient=((gradient - expected).norm() / expected.norm()).item(),
        resized_scores=(error.abs().max() / case.scores.std()).item(),
    )


# ---- pictures


def pictures(height: int, width: int) -> list[torch.Tensor]:
    """uint8 [H, W, 3] with edges and flat parts: two that fit, then down, up, and two that are not square.

    The last leaves an odd number of columns to cut away, half of which torchvision rounds up, transformers down.
    """
    found = []
    for i, size in enumerate([(height, width), (height, width), (512, 512), (40, 40), (300, 200), (157, 398)]):
        coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(i))
        picture = torch.nn.functional.interpolate(coarse, size, mode="nearest")
        found.append((picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8))
    return found


def as_images(array: torch.Tensor) -> torch.Tensor:
    return array.permute(2, 0, 1).unsqueeze(0).float() / 255


def write_request(folder: Path, side: int, **request) -> list[torch.Tensor]:
    """What a reference in another process reads: pictures as files, and request.json. Returns the images."""
    arrays = pictures(side, side)
    names = [f"picture_{i}.png" for i in range(len(arrays))]
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(array.numpy()).save(folder / name)
    request = {"pictures": names, "prompts": PROMPTS, "texts": TEXTS, **request}
    (folder / "request.json").write_text(json.dumps(request))
    return [as_images(array) for array in arrays]


# ---- references in a process of their own


def hps(folder: Path) -> Case:
    """The hpsv2 package, on the CPU and so in float32 (on a GPU it scores under fp16 autocast)."""
    images = write_request(folder, 224, model=HPS_MODEL)
    torch.save(images, folder / "images.pt")
    torch.save({"state_dict": open_clip_state(layers=(3, 3), widths=(320, 256))}, folder / "checkpoint.pt")
    answers = aside.ask("tests.helpers.hps_reference", aside.install_hps(), folder)
    options = {"checkpoint": str(folder / "checkpoint.pt"), "tokenizer": str(folder / "tokenizer")}
    reward = build_reward("hps", {"hps": options})
    tokens = reward.terms["hps"].tower.tokenize(PROMPTS + TEXTS), answers["tokens"]
    return Case(reward, images, answers["pixels"], tokens, answers["scores"], answers["gradient"], answers)


def imagereward(folder: Path) -> Case:
    """The image-reward package, with the transformers of its time."""
    return with_blip("imagereward", folder, "ImageReward.pt", imagereward_reference)


def cyclereward(folder: Path) -> Case:
    """The cyclereward package, with the same transformers."""
    return with_blip("cyclereward", folder, "CycleReward.pth", cyclereward_reference, positions=160, head_at=CYCLE)


def with_blip(name: str, folder: Path, file: str, reference, **sizes) -> Case:
    images = write_request(folder, 224)
    vocabulary = make_bert_tokenizer(folder / "bert-base-uncased") + 2
    torch.save(imagereward_state(vocabulary, **sizes), folder / file)
    packages = aside.install_pinned(f"{name}_reference", reference.REQUIREMENTS)
    answers = aside.ask(reference.__name__, packages, folder)
    options = {"checkpoint": str(folder / file), "tokenizer": str(folder / "bert-base-uncased")}
    reward = build_reward(name, {name: options})
    tokens = reward.terms[name].blip.tokenize(PROMPTS + TEXTS)[0], answers["tokens"]
    return Case(reward, images, answers["pixels"], tokens, answers["scores"], answers["gradient"], answers)


# ---- transformers' own processors and models


def clip(folder: Path) -> Case:
    options = make_options("clip", folder)
    return with_clip("clip", options, options["model"], options["model"], lambda output: output.logits_per_image / 100)


def pickscore(folder: Path) -> Case:
    """As the model's page says: its processor, then the logit scale times the cosine."""
    options = make_options("pickscore", folder)
    return with_clip("pickscore", options, options["model"], options["processor"], lambda o: o.logits_per_image)


def with_clip(name: str, options: dict, model: str, processor: str, scores_of: Callable) -> Case:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(model)
    texts = CLIPTokenizer.from_pretrained(processor)(
        PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    reward = build_reward(name, {name: options})
    tokens = reward.terms[name].tower.tokenize(PROMPTS), texts.input_ids
    return ask(
        reward, CLIPImageProcessorPil.from_pretrained(processor), tokens,
        lambda pixels: scores_of(model(pixel_values=pixels, **texts)),
    )  # fmt: skip


def aesthetic(folder: Path) -> Case:
    from transformers import CLIPImageProcessorPil, CLIPModel

    options = make_options("aesthetic", folder)
    model, head = CLIPModel.from_pretrained(options["clip"]), torch.load(options["head_file"])
    processor = CLIPImageProcessorPil.from_pretrained(options["clip"])
    return ask(
        build_reward("aesthetic", {"aesthetic": options}), processor, None,
        lambda pixels: through_linear_head(
            model.get_image_features(pixel_values=pixels).pooler_output, head, "layers", (0, 2, 4, 6, 7)
        ),
    )  # fmt: skip


def aesthetic_v2_5(folder: Path) -> Case:
    """The package's own steps: SiglipVisionModel, whose pooled states its head takes."""
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

    options = make_options("aesthetic_v2_5", folder)
    model, head = SiglipVisionModel.from_pretrained(options["model"]), torch.load(options["head_file"])
    processor = SiglipImageProcessorPil.from_pretrained(options["model"])
    return ask(
        build_reward("aesthetic_v2_5", {"aesthetic_v2_5": options}), processor, None,
        lambda pixels: through_linear_head(
            model(pixel_values=pixels).pooler_output, head, "scoring_head", (0, 2, 4, 6, 8)
        ),
    )  # fmt: skip


def through_linear_head(x: torch.Tensor, head: dict, prefix: str, places: tuple[int, ...]) -> torch.Tensor:
    """Of vectors [n, D] the scores [n, 6], which are the same for every prompt: one matrix product after another."""
    x = x / x.norm(dim=-1, keepdim=True)
    for i in places:
        x = x @ head[f"{prefix}.{i}.weight"].T.to(x.dtype) + head[f"{prefix}.{i}.bias"].to(x.dtype)
    return x.expand(-1, len(PROMPTS))


def siglip(folder: Path) -> Case:
    """transformers' SiglipModel; its tokenizer, which needs sentencepiece, in a process of its own."""
    from transformers import SiglipImageProcessorPil, SiglipModel

    write_request(folder, 64)
    packages = aside.install_pinned("siglip_reference", siglip_reference.REQUIREMENTS)
    answers = aside.ask("tests.helpers.siglip_reference", packages, folder)
    name = make_siglip(folder / "siglip", sentencepiece=(folder / "spiece.model").read_bytes(), length=64)
    model = SiglipModel.from_pretrained(name)
    reward = build_reward("siglip", {"siglip": {"model": str(name)}})
    tokens = reward.terms["siglip"].tower.tokenize(PROMPTS + TEXTS), answers["tokens"]

    def scores(pixels):
        output = model(pixel_values=pixels, input_ids=answers["tokens"][: len(PROMPTS)])
        return (output.logits_per_image - model.logit_bias) / model.logit_scale.exp()

    return ask(reward, SiglipImageProcessorPil.from_pretrained(name), tokens, scores)


def ask(reward: WeightedReward, processor, tokens, scores_of: Callable) -> Case:
    """scores_of: pixels [n, 3, h, w] to the scores [n, 6] of each with every prompt."""
    arrays = pictures(64, 64)
    pixels = [processor(Image.fromarray(a.numpy()), return_tensors="pt").pixel_values[0] for a in arrays]
    scores = torch.cat([scores_of(p.unsqueeze(0))[:, i] for i, p in enumerate(pixels)]).detach()
    square = torch.stack(pixels[:2]).requires_grad_()
    (gradient,) = torch.autograd.grad(scores_of(square).diagonal().sum(), square)
    return Case(reward, [as_images(array) for array in arrays], pixels, tokens, scores, gradient)


CASES = {f.__name__: f for f in (hps, clip, pickscore, imagereward, cyclereward, siglip, aesthetic, aesthetic_v2_5)}
