"""All rewards beside their references: those of reward_references.py, and newer judges beside float64 maths."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from rewards import build_reward, options_name
from rewards.hpsv3_prompt import REWARD_TOKEN
from tests.helpers import judge_references as maths
from tests.helpers import mps_maths, reward_references
from tests.helpers.reward_files import make_dinov3, make_lpips, make_options
from tests.helpers.reward_references import PROMPTS, Case, as_images, pictures
from tests.helpers.vqa_files import make_clip_t5, make_llava


def judge(reward, size: tuple, pixels_of: Callable, score_of: Callable, tokens=None, metadata=None) -> Case:
    """The reward beside `score_of`, of which autograd gives the gradient.

    Args:
        size: (height, width) of the pictures that need no resize.
        pixels_of: a picture [H, W, 3] of 8 bits to normalised pixels [3, h, w].
        score_of: pixels [3, h, w] float64 and the number of the picture to its score.
    """
    arrays = pictures(*size)
    pixels = [pixels_of(array) for array in arrays]
    leaves = [one.double().requires_grad_() for one in pixels]
    scores = torch.stack([score_of(leaf, i) for i, leaf in enumerate(leaves)])
    gradient = torch.stack(torch.autograd.grad(scores[:2].sum(), leaves[:2]))
    images = [as_images(array) for array in arrays]
    return Case(reward, images, pixels, tokens, scores.detach(), gradient, metadata=metadata)


def hpsv3(folder: Path) -> Case:
    options = make_options("hpsv3", folder)
    reward = build_reward("hpsv3", {"hpsv3": options})
    maths.shrink_hpsv3(reward)
    tower = reward.terms["hpsv3"].tower
    score = lambda pixels, i: maths.hpsv3_score(options, tower.tokenizer, pixels, PROMPTS[i])  # noqa: E731
    # The reward reads the chat up to the reward token, and each prompt once.
    before, after, lengths = tower.tokenize(PROMPTS)
    ours = [torch.cat([before, row[:length]]) for row, length in zip(after, lengths, strict=True)]
    whole = [maths.hpsv3_maths.tokens_of(tower.tokenizer, prompt, 0) for prompt in PROMPTS]
    theirs = [ids[: len(own)] for ids, own in zip(whole, ours, strict=True)]
    (reward_token,) = tower.tokenizer(REWARD_TOKEN).input_ids
    assert all(own[-1] == reward_token for own in ours) and after.shape[1] == max(lengths) > min(lengths)
    tokens = torch.cat(ours), torch.cat(theirs)
    return judge(reward, (112, 112), partial(maths.qwen_pixels, maths.HPSV3_AREA, maths.HPSV3_AREA), score, tokens)


def vqascore_qwen(folder: Path) -> Case:
    options = make_options("vqascore", folder)
    reward = build_reward("vqascore", {"vqascore": options})
    preprocess = reward.terms["vqascore"].tower.preprocess
    pixels_of = partial(maths.qwen_pixels, preprocess.fewest, preprocess.most)
    # Of 5 by 7 tokens, so that the windows of attention at the border are cut.
    return judge(reward, (140, 196), pixels_of, lambda pixels, i: maths.vqa_qwen_score(options, pixels, PROMPTS[i]))


def vqascore_clip_t5(folder: Path) -> Case:
    return vqascore_clip(make_clip_t5(folder), maths.clip_t5_score)


def vqascore_llava(folder: Path) -> Case:
    return vqascore_clip(make_llava(folder), maths.llava_score)


def vqascore_clip(options: dict, score_of: Callable) -> Case:
    reward = build_reward("vqascore", {"vqascore": options})
    return judge(reward, (56, 56), maths.square_pixels, lambda pixels, i: score_of(options, pixels, PROMPTS[i]))


def mps(folder: Path) -> Case:
    from transformers import CLIPTokenizer

    options = make_options("mps", folder)
    reward = build_reward("mps", {"mps": options})
    tower, state = reward.terms["mps"].tower, torch.load(options["checkpoint"])
    clip = copy.deepcopy(tower.model).double()
    words = CLIPTokenizer.from_pretrained(options["processor"])

    def tokenize(texts: list[str]) -> torch.Tensor:
        return words(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids

    score = lambda pixels, i: mps_maths.score(state, clip, tokenize, pixels, PROMPTS[i])  # noqa: E731
    normal = [tower.preprocess.mean.flatten().tolist(), tower.preprocess.std.flatten().tolist()]
    tokens = tower.tokenize(PROMPTS), tokenize(PROMPTS)
    return judge(reward, (56, 56), partial(maths.clip_pixels, 56, 56, normal), score, tokens)


def clip_image(folder: Path) -> Case:
    options = make_options("clip_image", folder)
    pixels_of = partial(maths.clip_pixels, 64, 64, maths.TINY_CLIP)
    return similarity("clip_image", options, folder, 64, maths.clip_embedding(options), pixels_of)


def dino(folder: Path) -> Case:
    options = make_options("dino", folder)
    pixels_of = partial(maths.clip_pixels, 256, 224, maths.IMAGENET)
    case = similarity("dino", options, folder, 256, maths.dino_embedding(options), pixels_of)
    return replace(case, gradient=F.pad(case.gradient, (16,) * 4))  # what the crop cuts away has none


def dinov3(folder: Path) -> Case:
    options = {"model": str(make_dinov3(folder / "dinov3"))}
    pixels_of = partial(maths.stretched_pixels, 224, maths.IMAGENET)
    return similarity("dino", options, folder, 224, maths.dino_embedding(options), pixels_of)


def similarity(name: str, options: dict, folder: Path, side: int, embed: Callable, pixels_of: Callable) -> Case:
    targets, metadata = save_targets(folder, side)
    with torch.no_grad():
        wanted = [embed(pixels_of(array).double()) for array in targets]
    reward = build_reward(name, {options_name(name): options})
    score = lambda pixels, i: F.cosine_similarity(embed(pixels), wanted[i], dim=0)  # noqa: E731
    return judge(reward, (side, side), pixels_of, score, metadata=metadata)


def lpips(folder: Path, net: str = "alex") -> Case:
    trunk, lin = make_lpips(folder, net)
    targets, metadata = save_targets(folder, 72)
    lins, maps = torch.load(lin), partial(maths.lpips_maps, net, torch.load(trunk))
    plain = lambda array: as_images(array)[0]  # noqa: E731
    score = lambda pixels, i: maths.lpips_score(maps, lins, pixels, plain(targets[i]).double())  # noqa: E731
    reward = build_reward("lpips", {"lpips": {"net": net, "trunk": str(trunk), "lin": str(lin)}})
    return judge(reward, (72, 72), plain, score, metadata=metadata)


def lpips_vgg(folder: Path) -> Case:
    return lpips(folder, "vgg")


def save_targets(folder: Path, side: int) -> tuple[list[torch.Tensor], list[dict]]:
    """A target of its own size for each picture: (pictures [H, W, 3] of 8 bits, metadata)."""
    targets = [picture.flip(0, 1) for picture in pictures(side, side)]
    paths = [folder / f"target_{i}.png" for i in range(len(targets))]
    for target, path in zip(targets, paths, strict=True):
        Image.fromarray(target.numpy()).save(path)
    return targets, [{"target": str(path)} for path in paths]


JUDGES = (hpsv3, mps, vqascore_qwen, vqascore_clip_t5, vqascore_llava, clip_image, dino, dinov3, lpips, lpips_vgg)
CASES = reward_references.CASES | {judge.__name__: judge for judge in JUDGES}
