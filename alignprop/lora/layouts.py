"""Reads the tensors of LoRA files in the layouts of several tools, and finds the model's layers that they belong to.

The name of a tensor contains the network, the layer in it, and the kind of the tensor:

| part of the name | is written as |
|---|---|
| denoiser | nothing, unet., transformer., diffusion_model., base_model.model., lora_unet_, lora_transformer_ |
| text encoder | text_encoder., text_encoder_2., lora_te_, lora_te1_, lora_te2_, clip_l., clip_g., … |
| layer | diffusers' name or the released checkpoint's (kohya_names.py), with points or underscores |
| A [rank, in, …] | .lora_A.weight, .lora_A.default.weight, .lora_down.weight, .lora.down.weight, …_lora.down.weight |
| B [out, rank, …] | the same with B or up |
| alpha, a number | .alpha |

This covers diffusers, peft, kohya's sd-scripts, OneTrainer, SimpleTuner, ai-toolkit and ComfyUI, if each layer of the
file is one layer of the model or a stack of several. Diffusers converts other layouts (foreign.py).
"""

import re
from dataclasses import dataclass, replace

import torch

from alignprop.lora.kohya_names import flat_names, released_names
from alignprop.lora.networks import adaptable_networks, layer, name_in_file
from alignprop.models.base import Model, split_name
from alignprop.settings.errors import ConfigError

_FACTOR = re.compile(
    r"(.+?)(?:\.lora_|\.lora\.|_lora\.|(?<=_lora\d)\.|\.lora_linear_layer\.)(A|B|down|up)(?:\.(\w+))?\.weight"
)
_DENOISER = re.compile(r"(lora_unet|lora_transformer|unet|transformer|diffusion_model|base_model_model)_")
_ENCODERS = {  # The prefixes of layers' names, after points have become underscores.
    "text_encoder": ("text_encoder", "lora_te", "lora_te1", "clip_l", "text_encoders_clip_l_transformer"),
    "text_encoder_2": ("text_encoder_2", "lora_te2", "clip_g", "text_encoders_clip_g_transformer"),
    "text_encoder_3": ("text_encoder_3", "lora_te3"),
    "T5": ("t5", "text_encoders_t5xxl_transformer"),
}
_OTHER_KINDS = (  # Pairs: a pattern in a tensor's name, and the kind of file that has such a tensor.
    (r"\.hada_w", "a LoHa"),
    (r"\.lokr_w", "a LoKr"),
    (r"\.oft_", "an OFT adapter"),
    (r"\.(dora_scale|lora_magnitude_vector)", "a DoRA"),
    (r"\.lora_mid\.", "a LoCon with a third factor"),
    (r"\.diff(_b)?$", "a file with whole weight differences"),
    (r"\.on_input$|\.ia3_", "an (IA)³ adapter"),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding"),
    (r"\.modules_to_save\.|\.lora_(B|up)\b.*\.bias$", "a LoRA with biases or with whole layers"),
    (r"^(bundle_emb|emb_params|string_to_param)", "an embedding of new words"),
)


@dataclass(frozen=True)
class Factors:
    """The factors of one layer of a file: ΔW = scale · up @ down.

    Attributes:
        down: the factor [rank, in, …].
        up: the factor [out, rank, …].
        scale: alpha / rank; None if the layer has no alpha among its tensors.
        keys: the names of the layer's tensors in the file.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float | None
    keys: tuple[str, ...]


def parse(raw: dict[str, torch.Tensor], source: str) -> dict[str, Factors]:
    """Returns the layers of a file by their names in it.

    Args:
        raw: the tensors of the file.
        source: the file's name in error messages.

    Raises:
        ConfigError: the file is not a LoRA, it holds several LoRAs, or a layer has only one of the two factors.
    """
    keys, others, adapters = {}, [], {}  # `keys` has {"down": key, "up": key, "alpha": key} of each layer.
    for key in raw:
        if match := _FACTOR.fullmatch(key):
            adapters.setdefault(match[3], key)
            keys.setdefault(_modern(match[1]), {})["down" if match[2] in ("A", "down") else "up"] = key
        elif key.endswith(".alpha"):
            keys.setdefault(_modern(key.removesuffix(".alpha")), {})["alpha"] = key
        else:
            others.append(key)
    _refuse_other_kinds(others, len(raw), source)
    if len(adapters) > 1:
        raise ConfigError(
            f"{source} holds several adapters, with the keys {' and '.join(map(repr, adapters.values()))}"
        )
    others += [key for found in keys.values() if not {"down", "up"} <= {*found} for key in found.values()]
    if others or not raw:
        raise ConfigError(
            f"{source}: {len(raw) - len(others)} of its {len(raw)} keys are pairs of LoRA factors, {len(others)} are "
            f"not, for example {(others or ['none at all'])[0]!r}"
        )
    layers = {}
    for name, found in keys.items():
        down, up = raw[found["down"]], raw[found["up"]]
        scale = raw[found["alpha"]].item() / len(down) if "alpha" in found else None
        layers[name] = Factors(down, up, scale, tuple(found.values()))
    return layers


def _refuse_other_kinds(keys: list[str], of: int, source: str) -> None:
    for pattern, kind in _OTHER_KINDS:
        if found := [key for key in keys if re.search(pattern, key)]:
            raise ConfigError(
                f"{source} looks like {kind}: {len(found)} of its {of} keys are, such as {found[0]!r}; only LoRAs "
                "can be read"
            )


def diffusers_name(name: str) -> str:
    """Turns a layer's name in a file of diffusers into its name in lora/networks.py."""
    name = re.sub(r"^(unet|transformer)\.", "", name)
    return re.sub(r"^(text_encoder\w*)\.(?!text_model\.|text_projection\.)", r"\1.text_model.", name)


def place(layers: dict[str, Factors], model: Model, source: str) -> tuple[dict[str, Factors], list[str]]:
    """Finds the model's layers for the layers of a file, and splits stacks of several layers.

    Returns:
        The layers by their names in the model (lora/networks.py), and the names of the file's layers that match no
        layer of the model's denoiser under any name that is known here. Layers with ΔW = 0 may be left out.

    Raises:
        ConfigError: some are of a text encoder that has no such layer, or that LoRAs of this model have no place for.
    """
    places, placed, unknown = _places(model), {}, []
    for name, factors in layers.items():
        modules = _find(places, name)
        if modules:
            placed |= _split(factors, modules, model, name)
        elif not factors.up.any():
            continue  # Its ΔW is 0, so nothing is lost.
        elif encoder := _encoder_of(name):
            raise ConfigError(
                f"{source} has a LoRA of a text encoder ({encoder}) that LoRAs of this model have no place for: "
                f"{factors.keys[0]!r}"
            )
        else:
            unknown.append(name)
    return placed, unknown


def _places(model: Model) -> dict[str, tuple[str, ...]]:
    """Returns {name with underscores, without a prefix for the denoiser: the model's layers that it stacks}."""
    released = released_names(model.denoiser)
    # OneTrainer's files name each layer of a stack separately.
    single = {f"{name}_{i}": (m,) for name, stack in released.items() if len(stack) > 1 for i, m in enumerate(stack)}
    places = released | single | {name: (module,) for name, module in flat_names(model.denoiser).items()}
    for part, network in adaptable_networks(model).items():
        for module in flat_names(network).values() if part else ():
            name = name_in_file(model, part, module)
            inner = split_name(name)[1].replace(".", "_")
            for prefix in _ENCODERS[part]:
                places[f"{prefix}_{inner}"] = places[f"{prefix}_{inner.removeprefix('text_model_')}"] = (name,)
    return places


def _find(places: dict[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    flat = name.replace(".", "_")
    while flat not in places and (prefix := _DENOISER.match(flat)):
        flat = flat[prefix.end() :]
    return places.get(flat, ())


def _encoder_of(name: str) -> str:
    flat = name.replace(".", "_")
    found = [(prefix, part) for part, prefixes in _ENCODERS.items() for prefix in prefixes]
    return next((part for prefix, part in sorted(found, reverse=True) if flat.startswith(f"{prefix}_")), "")


def _split(factors: Factors, modules: tuple[str, ...], model: Model, name: str) -> dict[str, Factors]:
    """Splits a file's layer that stacks the outputs of several layers, and returns the factors of each of them."""
    if len(modules) == 1:
        return {modules[0]: factors}
    sizes = [layer(model, module).weight.shape[0] for module in modules]
    if sum(sizes) != len(factors.up):
        raise ConfigError(f"LoRA: {name!r} is {sum(sizes)} wide in this model, {len(factors.up)} in the file")
    split = {}
    for module, up in zip(modules, factors.up.split(sizes), strict=True):
        used = up.flatten(1).any(0)  # A rank that belongs to another layer of the stack is zero here.
        if used.any():
            split[module] = replace(factors, down=factors.down[used], up=up[:, used])
    return split


def _modern(name: str) -> str:
    """Turns a name from when diffusers kept the LoRA in an attention's processor into the layer's present name."""
    name = re.sub(r"\.processor\.to_(q|k|v|out)$", r".to_\1", name)
    name = re.sub(r"(attn\d?)\.to_out$", r"\1.to_out.0", name)
    return re.sub(r"self_attn\.to_(q|k|v|out)(\.0)?$", r"self_attn.\1_proj", name)
