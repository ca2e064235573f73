"""Small files in the formats that the rewards read: CLIP and SigLIP folders, an aesthetic head, HPSv2 checkpoints."""

import json
import math
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from alignprop.prompts import load_prompts
from tests.helpers.hpsv3_files import hpsv3_state, make_qwen2_5_vl, make_qwen_tokenizer
from tests.helpers.imagereward_files import CYCLE, imagereward_state, make_bert_tokenizer


def randomise(model, seed=0):
    """Weights from a generator of our own, so that golden values do not depend on how transformers draws them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name == "logit_scale":
                weight.fill_(math.log(100))
            elif name == "logit_bias":
                weight.fill_(-10.0)
            else:
                std = 0.1 if weight.ndim < 2 else math.prod(weight.shape[1:]) ** -0.5
                values = std * torch.randn(weight.shape, generator=generator)
                weight.copy_(values + (weight.ndim == 1 and name.endswith("weight")))
    return model


def byte_symbols() -> list[str]:
    """The 256 printable symbols in which CLIP's byte-level BPE writes bytes, in CLIP's order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def make_tokenizer(merges=(), size=None):
    """A CLIPTokenizer whose vocabulary is bytes plus `merges` (pairs), filled up to `size` tokens."""
    from transformers import CLIPTokenizer

    symbols = byte_symbols()
    symbols = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
    if size is not None:
        symbols += [f"<filler{i}>" for i in range(size - 2 - len(symbols))]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({symbol: i for i, symbol in enumerate(symbols)}, list(merges))


def make_clip(
    folder, width=32, projection_dim=24, image_size=64, patch_size=16, preprocessor=True, seed=None, **config
):
    """A random CLIPModel with tokenizer and preprocessor file, as `save_pretrained` writes them.

    seed: of `randomise`; None leaves the weights that transformers draws.
    """
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = make_tokenizer()
    tower = dict(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=2,
        initializer_factor=4.0,  # at 1 the random embeddings hardly tell two images apart
    )
    text = dict(
        tower,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(tower, image_size=image_size, patch_size=patch_size)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim, **config))
    if seed is not None:
        randomise(model, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if preprocessor:
        CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.2, 0.3, 0.25],
        ).save_pretrained(folder)
    return folder


def laion_head(input_dim=768) -> dict[str, torch.Tensor]:
    """The state dict of the published LAION head, with random weights."""
    torch.manual_seed(1)
    layers = {0: (input_dim, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for i, (before, after) in layers.items():
        layer = nn.Linear(before, after)
        state[f"layers.{i}.weight"], state[f"layers.{i}.bias"] = layer.weight.detach(), layer.bias.detach()
    return state


def v2_5_head(input_dim=1152) -> dict[str, torch.Tensor]:
    """The state dict of aesthetic-predictor-v2-5's head in bfloat16, as published, with random weights."""
    generator, widths = torch.Generator().manual_seed(6), (input_dim, 1024, 128, 64, 16, 1)
    state = {}
    for i, before, after in zip((0, 2, 4, 6, 8), widths, widths[1:], strict=False):
        state[f"scoring_head.{i}.weight"] = torch.randn(after, before, generator=generator) * before**-0.5
        state[f"scoring_head.{i}.bias"] = torch.randn(after, generator=generator) * 0.1
    return {name: weight.bfloat16() for name, weight in state.items()}


def open_clip_state(
    layers=(2, 2), widths=(160, 128), mlps=None, embed_dim=64, vocab=49408, context=77, image_size=224, patch=14
) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of open_clip's ViT-H-14; layers and widths are (vision, text)."""
    generator = torch.Generator().manual_seed(2)
    mlps = mlps or (4 * widths[0], 4 * widths[1])

    def normal(*shape, std=0.02):
        return torch.randn(*shape, generator=generator) * std

    def norm(name, width):
        return {f"{name}.weight": 1 + normal(width, std=0.1), f"{name}.bias": normal(width, std=0.1)}

    state = {
        "positional_embedding": normal(context, widths[1], std=0.01),
        "text_projection": normal(widths[1], embed_dim, std=widths[1] ** -0.5),
        "logit_scale": torch.tensor(4.6052),
        "visual.class_embedding": normal(widths[0]),
        "visual.positional_embedding": normal((image_size // patch) ** 2 + 1, widths[0]),
        "visual.proj": normal(widths[0], embed_dim, std=widths[0] ** -0.5),
        "visual.conv1.weight": normal(widths[0], 3, patch, patch),
        "token_embedding.weight": normal(vocab, widths[1]),
        **norm("visual.ln_pre", widths[0]),
        **norm("visual.ln_post", widths[0]),
        **norm("ln_final", widths[1]),
    }
    for tower, depth, width, mlp in zip(("visual.transformer", "transformer"), layers, widths, mlps, strict=True):
        for i in range(depth):
            block = f"{tower}.resblocks.{i}"
            std = width**-0.5
            state |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            state |= {
                f"{block}.attn.in_proj_weight": normal(3 * width, width, std=std),
                f"{block}.attn.in_proj_bias": normal(3 * width),
                f"{block}.attn.out_proj.weight": normal(width, width, std=std),
                f"{block}.attn.out_proj.bias": normal(width),
                f"{block}.mlp.c_fc.weight": normal(mlp, width, std=std),
                f"{block}.mlp.c_fc.bias": normal(mlp),
                f"{block}.mlp.c_proj.weight": normal(width, mlp, std=mlp**-0.5),
                f"{block}.mlp.c_proj.bias": normal(width),
            }
    return state


def mps_state(vocab=600, width=128, context=77) -> dict[str, torch.Tensor]:
    """Random float16 weights under the names and shapes of MPS's module, with its constants; two layers a tower.

    Digits, of which the condition has none, are unlike all other characters, so that they are masked.
    """
    from rewards.hps import convert_open_clip

    clip = convert_open_clip(open_clip_state(embed_dim=width, vocab=vocab, context=context, image_size=56))
    state = {f"model.{name}": weight for name, weight in clip.items()}
    for tower, count in (("text", context), ("vision", 17)):
        state[f"model.{tower}_model.embeddings.position_ids"] = torch.arange(count).unsqueeze(0)
    generator, inner = torch.Generator().manual_seed(7), 4 * width

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    for i in range(4):
        cross, own = (f"cross_model.layers.{i}.{j}.fn" for j in (0, 1))
        shapes = {
            f"{cross}.to_q": (width, width), f"{cross}.to_kv": (128, width), f"{cross}.to_out": (width, width),
            f"{cross}.ff.0": (2 * inner, width), f"{cross}.ff.2": (width, inner),
            f"{own}.fused_attn_ff_proj": (width + 128 + 2 * inner, width), f"{own}.attn_out": (width, width),
            f"{own}.ff_out.1": (width, inner),
        }  # fmt: skip
        state |= {f"{name}.weight": normal(*shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
        for part in (cross, own):
            state |= {f"{part}.norm.weight": 1 + 0.1 * normal(width), f"{part}.norm.bias": torch.zeros(width)}
        state[f"{own}.rotary_emb.inv_freq"] = 10000 ** -(torch.arange(32) / 32)
    embeddings = state["model.text_model.embeddings.token_embedding.weight"]
    direction = normal(embeddings.shape[1])
    direction = (direction - direction.mean()) / direction.norm()
    digits = torch.tensor([ord(c) - 33 + shift for c in "0123456789" for shift in (0, 256)])
    signs = torch.ones(vocab, 1).index_fill(0, digits, -1.0)
    state["model.text_model.embeddings.token_embedding.weight"] = embeddings + 20 * signs * direction
    state["model.text_projection.weight"] += 0.5 * torch.outer(normal(width), direction)
    return {name: weight.half() if weight.is_floating_point() else weight for name, weight in state.items()}


# ---- SigLIP


def make_siglip(folder, image_size=64, sentencepiece=None, resample=3, length=16):
    """A random SiglipModel with its processor's files; sentencepiece: a spiece.model's bytes, else a small one."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    sentencepiece = sentencepiece or small_sentencepiece()
    folder = Path(folder)
    size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    text = dict(size, vocab_size=len(pieces_of(sentencepiece)), max_position_embeddings=length)
    text |= dict(bos_token_id=1, eos_token_id=1)
    config = SiglipConfig(text_config=text, vision_config=dict(size, image_size=image_size, patch_size=16))
    randomise(SiglipModel(config), seed=4).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}, resample=resample).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(sentencepiece)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    return folder


def pieces_of(sentencepiece: bytes):
    from transformers.convert_slow_tokenizer import import_protobuf

    file = import_protobuf().ModelProto()
    file.ParseFromString(sentencepiece)
    return file.pieces


def small_sentencepiece() -> bytes:
    """A unigram model of letters and a few words in sentencepiece's format, without its package."""
    from transformers.convert_slow_tokenizer import import_protobuf

    file = import_protobuf().ModelProto()
    file.trainer_spec.model_type, file.trainer_spec.unk_id = 1, 2
    words = ["▁", *string.ascii_lowercase, *string.digits, "▁a", "▁red", "▁cat", "▁dogs", "▁two", "▁so", "fa"]
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    for rank, piece in enumerate([*kinds, *words]):
        score = 0.0 if piece in kinds else -3.0 - 0.1 * rank + 2 * len(piece)
        file.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    return file.SerializeToString()


# ---- similarity to a picture


def make_dino(folder, image_size=70):
    """A random Dinov2Model, whose positions are interpolated to 224 pixels, as those of the hub's 518 are."""
    from transformers import Dinov2Config, Dinov2Model

    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=image_size)
    randomise(Dinov2Model(Dinov2Config(**size)), seed=8).save_pretrained(folder)
    return folder


def make_dinov3(folder):
    """A random DINOv3ViTModel with registers, as the released ones have."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_register_tokens=4)
    randomise(DINOv3ViTModel(DINOv3ViTConfig(**size)), seed=8).save_pretrained(folder)
    return folder


def make_lpips(folder, net="alex"):
    """Random weights of a narrow trunk, with a classifier, and of its features. Returns (trunk's file, lin's file)."""
    from rewards.lpips import NETS, TrunkTower

    kind = NETS[net]
    tower = TrunkTower(kind, [16 + i for i in range(len(kind.convolutions))])
    generator = torch.Generator().manual_seed(9)
    state = {name: torch.randn(w.shape, generator=generator) for name, w in tower.state_dict().items()}
    state = {name: w * w[0].numel() ** -0.5 if w.ndim > 1 else 0.1 * w for name, w in state.items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, Path(folder) / f"{net}-trunk.pth")
    lins = {
        f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for i, w in enumerate(tower.tap_widths)
    }
    torch.save(lins, Path(folder) / f"{net}.pth")
    return Path(folder) / f"{net}-trunk.pth", Path(folder) / f"{net}.pth"


def save_target(path, height=80, width=100):
    """A picture to compare with, as a PNG. Returns its path."""
    from PIL import Image

    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(10), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return str(path)


# ---- all of them


def make_options(name, folder) -> dict:
    """The options of the reward `name` for files of its format that this writes into `folder`."""
    folder = Path(folder)
    if name == "dino":
        return {"model": str(make_dino(folder / "dino"))}
    if name == "lpips":
        trunk, lin = make_lpips(folder)
        return {"trunk": str(trunk), "lin": str(lin)}
    if name in ("clip", "clip_image"):
        return {"model": str(make_clip(folder / "clip", seed=1))}
    if name == "aesthetic":
        torch.save(laion_head(24), folder / "head.pth")
        return {"clip": str(make_clip(folder / "clip", seed=1)), "head_file": str(folder / "head.pth")}
    if name == "aesthetic_v2_5":
        torch.save(v2_5_head(32), folder / "v2_5.pth")
        return {"model": str(make_siglip(folder / "siglip")), "head_file": str(folder / "v2_5.pth")}
    if name == "pickscore":
        model = make_clip(folder / "pickscore", seed=2, preprocessor=False)
        return {"model": str(model), "processor": str(make_clip(folder / "processor"))}
    if name == "siglip":
        return {"model": str(make_siglip(folder / "siglip"))}
    if name == "hps":
        torch.save({"state_dict": open_clip_state(vocab=600)}, folder / "hps.pt")
        make_tokenizer(size=600).save_pretrained(folder / "tokenizer")
        return {"checkpoint": str(folder / "hps.pt"), "tokenizer": str(folder / "tokenizer")}
    if name == "hpsv3":
        vocabulary = make_qwen_tokenizer(folder / "qwen") + 1
        save_file(hpsv3_state(vocabulary), folder / "HPSv3.safetensors")
        checkpoint, tokenizer = str(folder / "HPSv3.safetensors"), str(folder / "qwen")
        return {"checkpoint": checkpoint, "tokenizer": tokenizer, "dtype": "float32"}
    if name == "geneval":
        from tests.helpers.detector_files import make_mask2former

        rows = load_prompts("geneval").metadata
        classes = sorted({clause["class"] for row in rows for clause in row["include"]})
        return {
            "model": str(make_mask2former(folder / "finder", classes)),
            "clip": str(make_clip(folder / "clip", seed=1)),
        }
    if name == "mps":
        torch.save(mps_state(), folder / "mps.pt")
        make_tokenizer(size=600).save_pretrained(folder / "processor")
        return {"checkpoint": str(folder / "mps.pt"), "processor": str(folder / "processor")}
    if name == "vqascore":
        return {"model": str(make_qwen2_5_vl(folder / "qwen2_5_vl")), "dtype": "float32"}
    assert name in ("imagereward", "cyclereward")
    vocabulary = make_bert_tokenizer(folder / "bert") + 2
    cycle = dict(positions=160, head_at=CYCLE) if name == "cyclereward" else {}
    torch.save(imagereward_state(vocabulary, **cycle), folder / "ImageReward.pt")
    return {"checkpoint": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")}


def assert_gradient_is_the_central_difference(reward, images: torch.Tensor, prompts: list[str]) -> None:
    """Along the gradient itself, by steps of .002 in the pixel that changes most."""
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    direction = gradient / gradient.abs().max()
    with torch.no_grad():
        ends = [reward(images + step * direction, prompts).sum() for step in (2e-3, -2e-3)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 4e-3, rtol=2e-2, atol=0)
