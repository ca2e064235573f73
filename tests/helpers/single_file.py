"""Random-weight Stable Diffusion for the tests: a diffusers folder, and one file in the original layout.

The folder has Stable Diffusion 1.5's structure (four blocks of two layers, spatial transformers in three of them,
77 text tokens, VAE of factor 8) with few channels and a real byte-level BPE tokenizer. The single file has the
key names of the released SD 1.x checkpoints (latent-diffusion's), which other tools write and users bring.
"""

import json
import re
from pathlib import Path

import torch

WORDS = ("a", "photo", "of", "the", "two", "red", "green", "blue", "cat", "dog", "bird", "circle", "square", "on")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


# ---- the folder


def make_pipeline(
    folder,
    prediction_type: str = "epsilon",
    channels: tuple[int, ...] = (16, 32, 32, 32),
    layers_per_block: int = 2,
    sample_size: int = 8,
    vae_channels: tuple[int, ...] = (8, 16, 16, 16),
    text_width: int = 32,
    seed: int = 0,
) -> Path:
    """Write a random-weight ``StableDiffusionPipeline`` to ``folder`` and return it as a Path.

    Args:
        prediction_type: the scheduler's, "epsilon" or "v_prediction".
        channels: the UNet's, one number per block; spatial transformers in all blocks but the last. A single block has
            them, and there is no middle one then, so that a call is quick.
        layers_per_block: of UNet and VAE.
        sample_size: side of the latents; pictures are ``sample_size * 2 ** (len(vae_channels) - 1)`` wide.
        vae_channels: one number per VAE block.
        text_width: hidden size of the text encoder.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    folder = Path(folder)
    vocab_size = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # one stream for all three: their order is part of the weights
        text_encoder = _text_encoder(vocab_size, text_width)
        unet = _unet(channels, layers_per_block, sample_size, text_width)
        vae = _vae(vae_channels, layers_per_block, sample_size)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _text_encoder(vocab_size: int, width: int):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=width, bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1,
    ))  # fmt: skip


def _unet(channels: tuple[int, ...], layers_per_block: int, sample_size: int, text_width: int):
    from diffusers import UNet2DConditionModel

    plain = 1 if len(channels) > 1 else 0
    crossed = len(channels) - plain
    return UNet2DConditionModel(
        sample_size=sample_size, block_out_channels=channels, layers_per_block=layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",) * plain,
        up_block_types=("UpBlock2D",) * plain + ("CrossAttnUpBlock2D",) * crossed,
        mid_block_type="UNetMidBlock2DCrossAttn" if plain else None, cross_attention_dim=text_width,
        attention_head_dim=8,  # Stable Diffusion 1.x: the number of heads, in spite of its name
        norm_num_groups=8,
    )  # fmt: skip


def _vae(channels: tuple[int, ...], layers_per_block: int, sample_size: int):
    from diffusers import AutoencoderKL

    blocks = len(channels)
    return AutoencoderKL(
        sample_size=sample_size * 2 ** (blocks - 1), block_out_channels=channels, layers_per_block=layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4, norm_num_groups=4,
    )  # fmt: skip


def write_tokenizer(folder: Path) -> int:
    """Write a CLIP tokenizer whose merges build ``WORDS`` out of bytes, and return its vocabulary's size."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_tokens = [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    vocab = byte_tokens + [token + "</w>" for token in byte_tokens]
    merges = []
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
                vocab.append(left + right)
            left += right
    vocab = [*dict.fromkeys(vocab), BOS, EOS]
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})
    )
    return len(vocab)


# ---- the single file


def write_single_file(folder, path) -> Path:
    """Write the weights of a pipeline ``folder`` as one file: ".safetensors" or (pickled) ".ckpt"."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    path = Path(path)
    state = original_state_dict(StableDiffusionPipeline.from_pretrained(folder))
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 1}, path)
    return path


def original_state_dict(pipeline) -> dict[str, torch.Tensor]:
    """The pipeline's weights under the names of the original SD 1.x checkpoints."""
    text = {f"text_model.{key}": w for key, w in pipeline.text_encoder.state_dict().items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # in released files, though no weight
    layers = pipeline.unet.config.layers_per_block
    blocks = len(pipeline.vae.config.block_out_channels)
    unet = {_unet_key(key, layers): w for key, w in pipeline.unet.state_dict().items()}
    vae = dict(_vae_entry(key, weight, blocks) for key, weight in pipeline.vae.state_dict().items())
    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae, "cond_stage_model.transformer.": text}
    return {prefix + key: w.clone().contiguous() for prefix, part in parts.items() for key, w in part.items()}


UNET_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet_key(key: str, layers: int) -> str:
    """The original UNet has input blocks, a middle block and output blocks, each a list of one to three members.

    A downsampler is an input block of its own; an upsampler is the last member of the output block before it.
    """
    module, weight = key.rsplit(".", 1)
    if module in UNET_OUTSIDE:
        return f"{UNET_OUTSIDE[module]}.{weight}"
    place, kind, index, rest = re.fullmatch(r"([a-z]+_blocks?(?:\.\d+)?)\.(\w+)\.(\d+)\.(.+)", key).groups()
    index = int(index)
    if kind == "resnets":
        inner, parameter = rest.rsplit(".", 1)
        rest = f"{UNET_RESNET[inner]}.{parameter}"
    if place == "mid_block":  # resnet, attention, resnet
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    block = int(place.split(".")[1])
    if place.startswith("down"):
        first = 1 + block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"
    first = block * (layers + 1)
    if kind == "upsamplers":
        member = 1 if block == 0 else 2  # the first up block has no attention before it
        return f"output_blocks.{first + layers}.{member}.{rest}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"


def _vae_entry(key: str, weight: torch.Tensor, blocks: int) -> tuple[str, torch.Tensor]:
    """The original VAE counts up blocks from the output, and its attention projects with 1x1 convolutions."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        place, inner = key.split("mid_block.attentions.0.")
        name, parameter = inner.rsplit(".", 1)
        key = f"{place}mid.attn_1.{VAE_ATTENTION[name]}.{parameter}"
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
    return key, weight
