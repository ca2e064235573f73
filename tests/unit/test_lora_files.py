import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop.lora.factors import get_lora, set_lora, trainable_parameters
from alignprop.lora.files import LORA_FILE, read_lora, save_lora
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from tests.unit.test_factors import add_random, predict


@pytest.fixture
def model(pipeline_folder):
    return StableDiffusion.load(str(pipeline_folder))


@pytest.mark.parametrize("alpha", [3.0, 6.0])
def test_saved_file_reloads_exactly_here_and_in_a_plain_pipeline(model, pipeline_folder, tmp_path, alpha):
    base = predict(model)
    add_random(model, alpha=alpha)
    expected = predict(model)
    save_lora(model, get_lora(model.denoiser), tmp_path)

    ours = StableDiffusion.load(str(pipeline_folder))
    set_lora(ours.denoiser, read_lora(tmp_path))
    assert torch.equal(predict(ours), expected)
    assert not trainable_parameters(ours.denoiser)

    plain = StableDiffusion.load(str(pipeline_folder))
    plain.pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(plain), expected, rtol=0, atol=1e-6)
    assert (expected - base).abs().max() > 0.1


def test_attention_processor_keys_of_the_released_checkpoints_are_read(model, pipeline_folder, tmp_path):
    add_random(model)
    released = {}
    for name, tensor in get_lora(model.denoiser).tensors.items():
        module, factor = name.rsplit(".lora_", 1)
        parent, layer = module.replace("to_out.0", "to_out").rsplit(".", 1)
        released[f"{parent}.processor.{layer}_lora.{'down' if factor[0] == 'A' else 'up'}.weight"] = tensor
    assert any("attn1.processor.to_out_lora.up.weight" in name for name in released)
    save_file(released, tmp_path / LORA_FILE)
    other = StableDiffusion.load(str(pipeline_folder))
    set_lora(other.denoiser, read_lora(tmp_path))
    assert torch.equal(predict(other), predict(model))


def test_files_that_are_no_lora_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no LoRA file"):
        read_lora(tmp_path)
    save_file({"conv_in.weight": torch.ones(2)}, tmp_path / LORA_FILE)
    with pytest.raises(ConfigError, match=r"0 of its 1 keys are .*, 1 are not, .*conv_in"):
        read_lora(tmp_path)


def test_a_truncated_file_is_refused(model, tmp_path):
    add_random(model)
    save_lora(model, get_lora(model.denoiser), tmp_path)
    path = tmp_path / LORA_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        read_lora(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(model, tmp_path, value):
    add_random(model)
    save_lora(model, get_lora(model.denoiser), tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / LORA_FILE)
    with pytest.raises(ConfigError, match=rf"1 of {len(tensors)} tensors hold NaN or infinity, such as '{name}'"):
        read_lora(tmp_path)


def test_file_keys_are_those_of_the_pipeline(model, tmp_path):
    add_random(model)
    save_lora(model, get_lora(model.denoiser), tmp_path)
    assert all(name.startswith("unet.") for name in load_file(tmp_path / LORA_FILE))


@pytest.mark.parametrize(("keys", "message"), [
    (["x.lora_A.weight"], r"0 of its 1 keys are pairs of LoRA factors, 1 are not, for example 'x.lora_A.weight'"),
    (["x.lora_A.weight", "x.lora_B.weight", "y.lora_B.weight"], r"2 of its 3 keys .*, 1 are not, .*'y.lora_B.weight'"),
    ([], r"0 of its 0 keys"),
])  # fmt: skip
def test_a_factor_without_its_other_is_refused(tmp_path, keys, message):
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / LORA_FILE)
    with pytest.raises(ConfigError, match=message):
        read_lora(tmp_path)


@pytest.mark.parametrize("header", ["{", "[]", '{"unet.r": 2}', '{"unet.r": 0, "unet.lora_alpha": 1}'])
def test_a_damaged_header_is_refused(tmp_path, header):
    pair = {f"x.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    save_file(pair, tmp_path / LORA_FILE, metadata={"lora_adapter_metadata": header})
    with pytest.raises(ConfigError, match="lora_adapter_metadata in its header is damaged"):
        read_lora(tmp_path)
