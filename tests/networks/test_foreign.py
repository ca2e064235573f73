"""LoRA files of other tools: each layer's ΔW against what it was written from, and diffusers' or peft's own reading."""

import pytest
import torch
from safetensors.torch import save_file

from alignprop.engine.seeding import generator
from alignprop.lora.adapters import set_adapter
from alignprop.lora.files import read_lora
from alignprop.lora.networks import adaptable_networks, layer
from alignprop.publish.verification import diffusers_deltas, weightless
from alignprop.settings.errors import ConfigError
from tests.helpers.tiny_families import TINY


def random_pair(name, rank, inputs, outputs, down="down", up="up"):
    sizes = {f"{name}.{down}.weight": (rank, inputs), f"{name}.{up}.weight": (outputs, rank)}
    return {key: torch.randn(size, generator=generator(key)) for key, size in sizes.items()}


def xlabs(model):
    """The layout of xlabs' trainer for FLUX.1."""
    width = model.denoiser.transformer_blocks[0].attn.to_q.weight.shape[0]
    first, single = "double_blocks.0.processor", "single_blocks.0.processor"
    return {
        **random_pair(f"{first}.qkv_lora1", 2, width, 3 * width),
        **random_pair(f"{first}.qkv_lora2", 2, width, 3 * width),
        **random_pair(f"{first}.proj_lora1", 2, width, width),
        **random_pair(f"{single}.qkv_lora", 2, width, 3 * width),
    }


def comfy(model):
    """The layout of ComfyUI and ai-toolkit: diffusers' names behind another prefix, and alphas."""
    layer = model.denoiser.layers[0].attention.to_q
    name = "diffusion_model.layers.0.attention.to_q"
    pair = random_pair(name, 2, layer.weight.shape[1], layer.weight.shape[0], "lora_down", "lora_up")
    return {**pair, f"{name}.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize(("family", "layout"), [("flux", xlabs), ("z_image", comfy)])
def test_it_is_read_as_diffusers_own_pipeline_reads_it(tmp_path, family, layout):
    path = tmp_path / "theirs.safetensors"
    model = weightless(TINY[family])
    save_file(layout(model), path)
    ours = read_lora(path, model)
    set_adapter(model, ours)  # refuses what has no place in the model
    expected = diffusers_deltas(path, weightless(TINY[family]))
    assert {*ours.modules} == {*expected} and len(expected) >= 1
    for module, delta in expected.items():
        torch.testing.assert_close(ours.delta(module), delta(), rtol=1e-5, atol=1e-6)
        assert ours.delta(module).abs().max() > 0.01


def test_layers_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(random_pair("double_blocks.7.processor.proj_lora1", 2, 8, 8), path)
    model = weightless(TINY["flux"])
    with pytest.raises(ConfigError, match=r"transformer_blocks\.7"):
        set_adapter(model, read_lora(path, model))


# ---- the same layers in the layouts of several tools

RANK, ALPHA = 2, 6.0
ATTENTION = (
    "attn1.to_q",
    "attn2.to_out.0",
    "attn.to_k",
    "attn.add_v_proj",
    "attention.to_k",
    "self_attn.q_proj",
    "self_attn.out_proj",
)
DOTTED = {"A": "lora_A.weight", "B": "lora_B.weight"}
NAMED = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
OLD = {"A": "lora.down.weight", "B": "lora.up.weight"}
KOHYA = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}


# layout: (families, what precedes a layer of the denoiser, of encoders 1 and 2, separator, what a tensor is called)
LAYOUTS = {
    "diffusers": ("sd sdxl flux sd3 z_image", "{denoiser}.", ("text_encoder.", "text_encoder_2."), ".", DOTTED),
    "named adapter": ("sd sdxl flux sd3 z_image", "{denoiser}.", ("text_encoder.", "text_encoder_2."), ".", NAMED),
    "old diffusers": ("sd sdxl", "unet.", ("text_encoder.", "text_encoder_2."), ".", OLD),
    "bare names": ("sd flux sd3", "", (), ".", DOTTED),
    "simple tuner": ("sdxl flux sd3", "{denoiser}.base_model.model.", (), ".", DOTTED),
    "comfy": ("sd sdxl flux sd3 z_image", "diffusion_model.", ("text_encoders.clip_l.transformer.",), ".", KOHYA),
    "kohya": ("sd sdxl flux", "lora_unet_", ("lora_te1_", "lora_te2_"), "_", KOHYA),
    "one trainer": ("flux sd3", "lora_transformer_", ("lora_te1_", "lora_te2_"), "_", KOHYA),
    "one trainer, dotted": ("sd sdxl", "lora_unet.", ("lora_te1.", "lora_te2."), ".", KOHYA),
    "one trainer, canonical": ("sd sdxl flux sd3", "{denoiser}.", ("clip_l.", "clip_g."), ".", KOHYA),
}  # fmt: skip
# Where diffusers reads the file too; others it refuses, ignores, or reads without their alphas.
READ_BY_DIFFUSERS = {
    *(("diffusers", family) for family in LAYOUTS["diffusers"][0].split()),
    ("comfy", "z_image"), ("kohya", "sd"), ("kohya", "sdxl"), ("one trainer", "flux"),
}  # fmt: skip
CASES = [(name, family) for name, (families, *_) in LAYOUTS.items() for family in families.split()]


def written(layout, model):
    """The tensors of a file in that layout, and the ΔW of each layer by the layer's own name."""
    _, prefix, encoders, separator, names = LAYOUTS[layout]
    prefixes = {"": prefix.format(denoiser=model.denoiser_name)}
    prefixes |= dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))
    file, deltas = {}, {}
    for part, network in adaptable_networks(model).items():
        chosen = [n for n, _ in network.named_modules() if n.endswith(ATTENTION)] if part in prefixes else ()
        for module in chosen:
            outputs, inputs = network.get_submodule(module).weight.shape
            down, up = (
                torch.randn(size, generator=generator(module, size)) for size in ((RANK, inputs), (outputs, RANK))
            )
            inner = module if not part or module.startswith("text_model.") else f"text_model.{module}"
            name = prefixes[part] + inner.replace(".", separator)
            file |= {f"{name}.{names['A']}": down, f"{name}.{names['B']}": up}
            if "alpha" in names:
                file[f"{name}.{names['alpha']}"] = torch.tensor(ALPHA)
            scale = ALPHA / RANK if "alpha" in names else 1.0
            deltas[f"{part}.{inner}" if part else module] = scale * up @ down
    assert len(deltas) > 1
    return file, deltas


def check_deltas(found, expected):
    """Of a LoRA and what its file was written from."""
    assert {*found.modules} == {*expected}
    for module, delta in expected.items():
        torch.testing.assert_close(found.delta(module), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_every_layer_is_what_the_file_says(tmp_path, layout, family):
    model, path = weightless(TINY[family]), tmp_path / "theirs.safetensors"
    file, expected = written(layout, model)
    save_file(file, path)
    found = read_lora(path, model)
    set_adapter(model, found)
    check_deltas(found, expected)
    if (layout, family) in READ_BY_DIFFUSERS:
        theirs = diffusers_deltas(path, weightless(TINY[family]))
        check_deltas(found, {module: delta() for module, delta in theirs.items()})


@pytest.mark.parametrize(("family", "names"), [
    ("sdxl", {
        "unet.input_blocks.3.1.proj_in": "down_blocks.1.attentions.0.proj_in",
        "lora_unet.output_blocks.0.1.transformer_blocks.1.attn1.to_q":
            "up_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q",
        "diffusion_model.middle_block.0.in_layers.2": "mid_block.resnets.0.conv1",
        "clip_g.text_model.encoder.layers.1.mlp.fc1": "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
    }),
    ("sd", {"unet.output_blocks.2.1.proj_in": "up_blocks.1.attentions.0.proj_in"}),
    ("flux", {
        "transformer.double_blocks.0.img_attn.qkv.1": "transformer_blocks.0.attn.to_k",
        "transformer.single_blocks.0.linear1.3": "single_transformer_blocks.0.proj_mlp",
        "diffusion_model.double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
        "base_model.model.double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    }),
])  # fmt: skip
def test_layers_are_known_by_the_names_of_released_checkpoints(tmp_path, family, names):
    model, file, expected = weightless(TINY[family]), {}, {}
    for theirs, module in names.items():
        outputs, inputs, *kernel = layer(model, module).weight.shape
        down = torch.randn(RANK, inputs, *kernel, generator=generator(theirs))
        up = torch.randn(outputs, RANK, *(1 for _ in kernel), generator=generator(theirs, "up"))
        file |= {f"{theirs}.lora_down.weight": down, f"{theirs}.lora_up.weight": up}
        expected[module] = (up.flatten(1) @ down.flatten(1)).view(outputs, inputs, *kernel)
    save_file(file, tmp_path / "theirs.safetensors")
    check_deltas(read_lora(tmp_path / "theirs.safetensors", model), expected)


def test_a_stack_of_layers_is_taken_apart(tmp_path):
    model, name = weightless(TINY["flux"]), "diffusion_model.double_blocks.0.img_attn.qkv"
    width = model.denoiser.transformer_blocks[0].attn.to_q.weight.shape[0]
    file = random_pair(name, 2, width, 3 * width, "lora_A", "lora_B")
    save_file(file, tmp_path / "theirs.safetensors")
    whole = file[f"{name}.lora_B.weight"] @ file[f"{name}.lora_A.weight"]
    modules = [f"transformer_blocks.0.attn.to_{kind}" for kind in "qkv"]
    expected = dict(zip(modules, whole.split(width), strict=True))
    check_deltas(read_lora(tmp_path / "theirs.safetensors", model), expected)


# ---- peft's folders


def peft_folder(model, folder, **options):
    """What peft saves of a LoRA of the denoiser with these options, and the ΔW of its layers."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model.denoiser, LoraConfig(target_modules=["to_q", "to_k"], **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator(name))
    wrapped.save_pretrained(folder)
    layers = {name: part for name, part in wrapped.base_model.model.named_modules() if hasattr(part, "lora_A")}
    return {name: part.get_delta_weight("default").detach() for name, part in layers.items()}


@pytest.mark.parametrize("options", [
    {"r": 2, "lora_alpha": 6},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 2, "lora_alpha": 6, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"attn1.to_q": 5, "^up_blocks.*to_k": 1}},
])  # fmt: skip
def test_a_folder_of_pefts_is_read_with_its_scales(tmp_path, options):
    expected = peft_folder(weightless(TINY["sd"]), tmp_path, **options)
    check_deltas(read_lora(tmp_path, weightless(TINY["sd"])), expected)
    check_deltas(read_lora(tmp_path / "adapter_model.safetensors", weightless(TINY["sd"])), expected)


@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 2, "lora_alpha": 6, "rank_pattern": {"attn2.to_k": 3}, "alpha_pattern": {"attn1.to_q": 5}},
])  # fmt: skip
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_settings_in_a_header_of_diffusers_count_as_its_loader_has_them(tmp_path, family, options):
    """As diffusers' training scripts write them."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    model = weightless(TINY[family])
    model.denoiser.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], **options))
    for name, parameter in model.denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator(name))
    part = model.denoiser_name
    layers, settings = get_peft_model_state_dict(model.denoiser), _collate_lora_metadata({part: model.denoiser})
    model.pipeline_class().save_lora_weights(tmp_path, **{f"{part}_lora_layers": layers}, **settings)
    theirs = diffusers_deltas(tmp_path, weightless(TINY[family]))
    expected = {module: delta() for module, delta in theirs.items()}
    check_deltas(read_lora(tmp_path, weightless(TINY[family])), expected)
    check_deltas(read_lora(tmp_path), expected)


@pytest.mark.parametrize(("change", "message"), [
    (lambda settings: settings.unlink(), "cannot read adapter_config.json next to it, which contains alpha"),
    (lambda settings: settings.write_text("{"), "adapter_config.json next to it is damaged"),
    (lambda settings: settings.write_text('{"r": 2}'), "adapter_config.json next to it is damaged"),
    (lambda settings: settings.write_text('{"peft_type": "LOHA"}'), "is a LOHA adapter by its adapter_config.json"),
])  # fmt: skip
def test_a_folder_of_pefts_without_its_settings_is_refused(tmp_path, change, message):
    peft_folder(weightless(TINY["sd"]), tmp_path, r=2)
    change(tmp_path / "adapter_config.json")
    with pytest.raises(ConfigError, match=message):
        read_lora(tmp_path, weightless(TINY["sd"]))


def test_a_folder_with_one_file_of_any_name_is_enough(tmp_path):
    model = weightless(TINY["sd"])
    file, expected = written("kohya", model)
    save_file(file, tmp_path / "my_style_v2.safetensors")
    check_deltas(read_lora(tmp_path, model), expected)
    save_file(file, tmp_path / "my_style_v1.safetensors")
    with pytest.raises(ConfigError, match=r"holds several files, name one: my_style_v1.safetensors, my_style_v2"):
        read_lora(tmp_path, model)


# ---- what is refused by its name


@pytest.mark.parametrize(("key", "kind"), [
    ("lora_unet_x.hada_w1_a", "a LoHa"),
    ("lora_unet_x.lokr_w1", "a LoKr"),
    ("lora_unet_x.oft_blocks", "an OFT adapter"),
    ("lora_unet_x.dora_scale", "a DoRA"),
    ("unet.x.lora_magnitude_vector", "a DoRA"),
    ("lora_unet_x.lora_mid.weight", "a LoCon with a third factor"),
    ("diffusion_model.x.diff_b", "a file with whole weight differences"),
    ("lora_unet_x.on_input", "an (IA)³ adapter"),
    ("base_model.model.x.lora_B.bias", "a LoRA with biases or with whole layers"),
    ("bundle_emb.<cat>.clip_l", "an embedding of new words"),
])  # fmt: skip
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_what_is_no_plain_lora_is_named(tmp_path, family, key, kind):
    model = weightless(TINY[family])
    save_file({**written("diffusers", model)[0], key: torch.ones(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ConfigError) as error:
        read_lora(tmp_path / "theirs.safetensors", model)
    assert f" looks like {kind}: 1 of its " in str(error.value) and repr(key) in str(error.value)


def test_several_adapters_in_one_file_are_refused(tmp_path):
    model = weightless(TINY["sd"])
    file = written("named adapter", model)[0]
    save_file(
        file | {k.replace("default", "second"): t.clone() for k, t in file.items()}, tmp_path / "theirs.safetensors"
    )
    with pytest.raises(
        ConfigError, match=r"holds several adapters, with the keys '.*default.weight' and '.*second.weight'"
    ):
        read_lora(tmp_path / "theirs.safetensors", model)


@pytest.mark.parametrize(("key", "encoder"), [
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_3"),
    ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "T5"),
    ("text_encoder_2.text_model.encoder.layers.7.self_attn.q_proj", "text_encoder_2"),
])  # fmt: skip
def test_an_encoder_without_a_place_is_refused_unless_it_is_nothing(tmp_path, key, encoder):
    """diffusers drops it and says nothing."""
    model, path = weightless(TINY["flux"]), tmp_path / "theirs.safetensors"
    file, expected = written("diffusers", model)
    pair = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.zeros(8, 2)}
    save_file(file | pair, path)
    check_deltas(read_lora(path, model), expected)
    pair[f"{key}.lora_up.weight"][3, 1] = 0.1
    save_file(file | pair, path)
    with pytest.raises(ConfigError, match=rf"a text encoder \({encoder}\) that LoRAs of this model have no place for"):
        read_lora(path, model)


def test_a_lora_of_another_base_model_is_refused(tmp_path):
    path = tmp_path / "theirs.safetensors"
    for layout, family in CASES:
        if family == "sdxl" and layout != "old diffusers":
            save_file(written(layout, weightless(TINY["sdxl"]))[0], path)
            with pytest.raises(ConfigError, match=r"is it from another base model|have no place for"):
                model = weightless(TINY["sd"])
                set_adapter(model, read_lora(path, model))
