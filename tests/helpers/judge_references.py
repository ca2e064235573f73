"""The maths of newer judges in float64, and the pixels that PIL and the processors of transformers make for them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from rewards.hpsv3_prompt import REWARD_TOKEN
from rewards.qwen_vl import patchify
from tests.helpers import hpsv3_maths

TINY_CLIP = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)  # mean and standard deviation in make_clip's preprocessor
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def per_channel(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


# ---- HPSv3

HPSV3_AREA = 112 * 112  # pixels, instead of the released 448 * 448, so that the tests are quick


def shrink_hpsv3(reward) -> None:
    preprocess = reward.terms["hpsv3"].tower.preprocess
    assert (preprocess.fewest, preprocess.most) == (200704, 200704)
    preprocess.fewest = preprocess.most = HPSV3_AREA


def hpsv3_score(options, tokenizer, pixels, prompt) -> torch.Tensor:
    """The maths reads the chat to its end, with the rounded frequencies of the release. Its pixels are [3, h, w]."""
    state = load_file(options["checkpoint"])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (REWARD_TOKEN, "<|image_pad|>")]
    picture = pixels * per_channel(hpsv3_maths.STD) + per_channel(hpsv3_maths.MEAN)
    tokens = hpsv3_maths.tokens_of(tokenizer, prompt, pixels[0].numel() // 784)
    return hpsv3_maths.score(state, picture, tokens, *ids)[0]


def qwen_pixels(fewest: int, most: int, array: torch.Tensor) -> torch.Tensor:
    """The pixels [3, h, w] of a picture [H, W, 3] of 8 bits, from the patches of transformers' processor."""
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": fewest, "longest_edge": most})
    made = processor(Image.fromarray(array.numpy()), return_tensors="pt")
    _, rows, columns = made.image_grid_thw[0].tolist()
    # Of the two equal frames the first. The four patches of a token stand together.
    patches = made.pixel_values.view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, 14 * rows, 14 * columns)


# ---- VQAScore on Qwen2.5-VL

QWEN_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
    'Does this figure show "{prompt}"? Please answer Yes or No.<|im_end|>\n<|im_start|>assistant\n'
)


def vqa_qwen_score(options, pixels, prompt) -> torch.Tensor:
    """The probability of "Yes", by transformers' own forward."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(options["model"]).double().eval()
    for name, buffer in model.named_buffers():  # the angles come from float32 frequencies
        assert "inv_freq" in name and buffer.dtype == torch.float64
    tokenizer = Qwen2Tokenizer.from_pretrained(options["model"])
    grid = torch.tensor([1, pixels.shape[1] // 14, pixels.shape[2] // 14])
    pads = "<|image_pad|>" * (grid.prod().item() // 4)
    ids = torch.tensor([tokenizer(QWEN_CHAT.format(pads=pads, prompt=prompt)).input_ids])
    logits = model(
        input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), use_cache=False,
        pixel_values=patchify(pixels[None])[0], image_grid_thw=grid[None],
    ).logits  # fmt: skip
    (yes,) = tokenizer("Yes").input_ids
    return logits[0, -1].softmax(-1)[yes]


# ---- VQAScore on CLIP-FlanT5 and LLaVA-1.5

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
CHAT = SYSTEM + ' USER: <image>\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '


def square_pixels(array: torch.Tensor) -> torch.Tensor:
    """The pixels [3, 56, 56] of a picture [H, W, 3] of 8 bits, padded to a square by PIL."""
    picture, side = Image.fromarray(array.numpy()), max(array.shape[:2])
    square = Image.new("RGB", (side, side), (127, 102, 76))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return clip_pixels(56, 56, TINY_CLIP, torch.from_numpy(np.array(square)))


def clip_pixels(shortest: int, side: int, normal: tuple, array: torch.Tensor) -> torch.Tensor:
    """The pixels [3, side, side] of a picture [H, W, 3] of 8 bits, by PIL and transformers' processor."""
    from transformers import CLIPImageProcessorPil

    mean, std = map(list, normal)
    sizes = dict(size={"shortest_edge": shortest}, crop_size={"height": side, "width": side})
    processor = CLIPImageProcessorPil(image_mean=mean, image_std=std, **sizes)
    return processor(Image.fromarray(array.numpy()), return_tensors="pt").pixel_values[0]


def clip_t5_score(options, pixels, prompt) -> torch.Tensor:
    """exp(-loss) of the answer. The package cuts the vocabulary to the tokens that the tokenizer has."""
    from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

    facts = json.loads(Path(options["model"], "config.json").read_text())
    files = Path(options["model"]).glob("pytorch_model-*.bin")
    state = {name: weight.double() for file in files for name, weight in torch.load(file).items()}
    tokenizer = T5Tokenizer.from_pretrained(options["tokenizer"])
    model = T5ForConditionalGeneration(T5Config(**facts)).double().eval()
    model.lm_head.weight = torch.nn.Parameter(state.pop("lm_head.weight")[: len(tokenizer)])
    assert set(model.load_state_dict(state, strict=False).missing_keys) == {"lm_head.weight"}
    clip = CLIPVisionModel.from_pretrained(facts["mm_vision_tower"]).double()
    seen = clip(pixels[None], output_hidden_states=True).hidden_states[-2][:, 1:]
    first, second = ([state[f"mm_projector.{place}.{part}"] for part in ("weight", "bias")] for place in (0, 2))
    picture = F.linear(F.gelu(F.linear(seen, *first)), *second)
    texts = [torch.tensor([tokenizer(text).input_ids]) for text in CHAT.format(prompt=prompt).split("<image>")]
    words = torch.cat([model.shared(texts[0]), picture, model.shared(texts[1])], dim=1)
    answer = torch.tensor([tokenizer("Yes").input_ids])
    assert answer.shape == (1, 2) and answer[0, 1] == tokenizer.eos_token_id
    return (-model(inputs_embeds=words, labels=answer).loss).exp()


def llava_score(options, pixels, prompt) -> torch.Tensor:
    """The same for LLaVA-1.5, by transformers' own forward."""
    from transformers import LlamaTokenizer, LlavaForConditionalGeneration

    tokenizer = LlamaTokenizer.from_pretrained(options["model"])
    model = LlavaForConditionalGeneration.from_pretrained(options["model"]).double().eval()
    before, after = CHAT.format(prompt=prompt).split("<image>")
    spell = partial(tokenizer, add_special_tokens=False)
    before, after = spell(before).input_ids, spell(after.rstrip() + " Yes</s>").input_ids
    assert tokenizer.convert_ids_to_tokens(before[-1:]) == ["▁"]
    assert tokenizer.convert_ids_to_tokens(after[:2]) == ["▁", "<0x0A>"]
    assert tokenizer.convert_ids_to_tokens(after[-2:]) == ["▁Yes", "</s>"]
    ids = torch.tensor([[tokenizer.bos_token_id] + before + [model.config.image_token_id] * 16 + after])
    logits = model(input_ids=ids, pixel_values=pixels[None], use_cache=False).logits
    words = model.config.image_token_id  # the tokens from here on were added
    assert words == tokenizer.vocab_size == len(tokenizer) - 2
    return (-F.cross_entropy(logits[0, -3:-1, :words], ids[0, -2:])).exp()


# ---- similarity to a target


def dino_embedding(options) -> Callable:
    """The class token that the model pools, of either DINO."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(options["model"]).double().eval()
    return lambda pixels: model(pixel_values=pixels[None]).pooler_output[0]


def stretched_pixels(side: int, normal: tuple, array: torch.Tensor) -> torch.Tensor:
    """As transformers' processor of DINOv3 makes them, which needs torchvision: divides by 255, then resizes."""
    picture = F.interpolate(array.permute(2, 0, 1)[None].float() / 255, (side, side), mode="bilinear", antialias=True)
    mean, std = map(per_channel, normal)
    return ((picture[0] - mean) / std).float()


def clip_embedding(options) -> Callable:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(options["model"]).double()
    return lambda pixels: model.get_image_features(pixel_values=pixels[None]).pooler_output[0]


def lpips_maps(net: str, state: dict, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The unit maps of torchvision's network, for a picture [3, H, W]; strides are those of its documentation."""
    shift, scale = per_channel((-0.03, -0.088, -0.188)), per_channel((0.458, 0.448, 0.45))
    x = (2 * pixels[None] - 1 - shift) / scale
    stage = {"alex": [(0, 4, 2), "pool3", (3, 1, 2), "pool3", (6, 1, 1), (8, 1, 1), (10, 1, 1)]}
    blocks = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
    vgg = [step for block in blocks for step in [*[(i, 1, 1) for i in block], "pool2"]]
    stops = {"alex": (0, 3, 6, 8, 10), "vgg": (2, 7, 14, 21, 28)}[net]
    maps = []
    for step in stage.get(net, vgg):
        if isinstance(step, str):
            x = F.max_pool2d(x, int(step[-1]), 2)
            continue
        place, stride, padding = step
        weight, bias = (state[f"features.{place}.{kind}"].double() for kind in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
        if place in stops:
            maps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
    return maps


def lpips_score(maps: Callable, lins: dict, pixels, target) -> torch.Tensor:
    pairs = zip(maps(pixels), maps(target), lins.values(), strict=True)
    return -sum((w.double() * (a - b).square()).sum(dim=1).mean() for a, b, w in pairs)
