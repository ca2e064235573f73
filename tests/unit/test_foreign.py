"""LoRA files of other tools: what diffusers' own pipeline makes of them, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from alignprop.engine.seeding import generator
from alignprop.lora.adapters import set_adapter
from alignprop.lora.files import read_lora
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


def test_a_layout_that_nobody_knows_is_one_line(tmp_path):
    path = tmp_path / "loha.safetensors"
    save_file({"blocks.0.hada_w1_a": torch.ones(2, 2), "blocks.0.hada_w1_b": torch.ones(2, 2)}, path)
    with pytest.raises(ConfigError) as error:
        read_lora(path, weightless(TINY["flux"]))
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "hada" in str(error.value)


def test_layers_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(random_pair("double_blocks.7.processor.proj_lora1", 2, 8, 8), path)
    model = weightless(TINY["flux"])
    with pytest.raises(ConfigError, match=r"transformer_blocks\.7"):
        set_adapter(model, read_lora(path, model))
