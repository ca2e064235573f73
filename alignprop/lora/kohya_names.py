"""The names of a model's layers in kohya's LoRA format, if the tools that read the format agree on them.

They depend on the denoiser:

| denoiser | `<name>`, for example | read by |
|---|---|---|
| Stable Diffusion 1.x, 2.x | lora_unet_down_blocks_0_attentions_0_…_attn1_to_q: diffusers' own | all |
| Stable Diffusion XL | lora_unet_input_blocks_4_1_…_attn1_to_q: the released checkpoint's | all |
| FLUX.1 | lora_unet_double_blocks_0_img_attn_qkv: the released checkpoint's, fused | all but A1111 |

"All" means diffusers' `load_lora_weights`, ComfyUI, the Stable Diffusion web UI (A1111), its relatives such as Forge,
and sd-scripts, where the format comes from. Layers of FLUX.1 outside of its blocks have no names here, because
diffusers drops them silently. Stable Diffusion 3 has no names at all: diffusers does not read the names that sd-scripts
uses, and sd-scripts reads no others. ComfyUI reads the names of diffusers (`transformer.….lora_A.weight`).

A layer of a text encoder has a name like lora_te_text_model_encoder_layers_0_self_attn_q_proj. It begins with
lora_te1_ or lora_te2_ if the model has several text encoders, as in Stable Diffusion XL, or might have, as in FLUX.1.

The table `_FORMATS` has what is known about each denoiser, by its class.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from alignprop.lora.networks import adaptable_networks, name_in_file
from alignprop.models.base import split_name

PREFIX = "lora_unet_"  # The names of every denoiser's layers begin with it, even if the denoiser is not a UNet.


@dataclass(frozen=True)
class Format:
    """kohya's format for one class of denoisers.

    Attributes:
        names: the denoiser -> {name in the file, without PREFIX: the modules whose outputs this layer stacks}.
        header: the denoiser -> header entries, by which some tools identify the base model instead of by the names.
        encoders: the denoiser -> {text encoder: the prefix of its layers' names in the file}.
    """

    names: Callable[[torch.nn.Module], dict[str, tuple[str, ...]]]
    header: Callable[[torch.nn.Module], dict[str, str]]
    encoders: Callable[[torch.nn.Module], dict[str, str]]


def find_format(denoiser: torch.nn.Module) -> Format | None:
    """Returns kohya's format for a denoiser; None if the tools do not agree on names for its layers."""
    # FSDP2 replaces the denoiser's class by a subclass of it.
    return next((_FORMATS[cls.__name__] for cls in type(denoiser).__mro__ if cls.__name__ in _FORMATS), None)


def known_layers(model) -> dict[str, tuple[str, ...]]:
    """Returns {name in the file: the modules (lora/networks.py) that this layer stacks}; empty for unknown formats."""
    form, layers = find_format(model.denoiser), {}
    if form is None:
        return layers
    layers |= {PREFIX + name: modules for name, modules in form.names(model.denoiser).items()}
    networks = adaptable_networks(model)
    for part, prefix in form.encoders(model.denoiser).items():
        for module in flat_names(networks[part]).values() if part in networks else ():
            name = name_in_file(model, part, module)
            layers[prefix + split_name(name)[1].replace(".", "_")] = (name,)
    return layers


def released_names(denoiser) -> dict[str, tuple[str, ...]]:
    """Returns {layer's name in the released checkpoint, with underscores: the modules it stacks}; {} if not known."""
    if hasattr(denoiser, "single_transformer_blocks") and find_format(denoiser):
        return _double_stream_names(denoiser)
    return _original_unet_names(denoiser) if hasattr(denoiser, "down_blocks") else {}


def flat_names(module) -> dict[str, str]:
    """Returns {name with underscores: module} of every layer with a weight matrix or kernel, adapted or not."""
    layers = {name: getattr(layer, "weight", None) for name, layer in module.named_modules()}
    plain = (name for name in layers if not re.search(r"\.(base_layer|lora_)", name))
    return {name.replace(".", "_"): name for name in plain if layers[name] is not None and layers[name].dim() > 1}


def _unet_names(unet) -> dict[str, tuple[str, ...]]:
    if _is_xl(unet):
        return _original_unet_names(unet)
    return {name: (module,) for name, module in flat_names(unet).items()}


def _original_unet_names(unet) -> dict[str, tuple[str, ...]]:
    layers = unet.config.layers_per_block
    return {_original_unet_name(module, layers).replace(".", "_"): (module,) for module in flat_names(unet).values()}


_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _original_unet_name(module: str, layers: int) -> str:
    """Returns the name of a UNet's layer in the released checkpoint.

    The checkpoint numbers all its blocks in sequence. A block is a list: resnet, attention, upsampler.

    Args:
        module: the layer's name in diffusers.
        layers: the number of resnets in one of diffusers' down blocks, which also have a downsampler. Up blocks have
            one resnet more.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    side, number, kind, index, inner = re.fullmatch(r"([a-z]+)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.(.+)", module).groups()
    index, inner = int(index), _RESNET[inner] if kind == "resnets" else inner
    member = {"resnets": 0, "attentions": 1, "upsamplers": 2, "downsamplers": 0}[kind]
    if side == "mid":  # The middle block is a list: resnet, attention, resnet.
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{inner}"
    first = int(number) * (layers + 1) + (side == "down")  # Input block 0 is conv_in.
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.{member}.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{member}.conv"
    return f"{'input' if side == 'down' else 'output'}_blocks.{first + index}.{member}.{inner}"


_DOUBLE_BLOCK = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}


def _double_stream_names(transformer) -> dict[str, tuple[str, ...]]:
    kinds = (("double", "transformer_blocks", _DOUBLE_BLOCK), ("single", "single_transformer_blocks", _SINGLE_BLOCK))
    return {
        f"{kind}_blocks_{i}_{name}": tuple(f"{blocks}.{i}.{part}" for part in parts)
        for kind, blocks, layers in kinds
        for i in range(len(getattr(transformer, blocks)))
        for name, parts in layers.items()
    }


# ---- the base models


def _is_xl(unet) -> bool:
    return unet.config.addition_embed_type == "text_time"


def _unet_header(unet) -> dict[str, str]:
    is_v2 = unet.config.cross_attention_dim == 1024
    version = "sdxl_base_v1-0" if _is_xl(unet) else "sd_v2" if is_v2 else "sd_v1"
    return {"ss_network_module": "networks.lora", "ss_base_model_version": version, "ss_v2": str(is_v2)}


def _unet_encoders(unet) -> dict[str, str]:
    two = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    return two if _is_xl(unet) else {"text_encoder": "lora_te_"}


_FORMATS = {
    "UNet2DConditionModel": Format(_unet_names, _unet_header, _unet_encoders),
    "FluxTransformer2DModel": Format(
        _double_stream_names,
        lambda _: {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1", "ss_v2": "False"},
        lambda _: {"text_encoder": "lora_te1_"},
    ),
}
