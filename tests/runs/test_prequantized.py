"""Denoisers from files of their own, and networks whose files are quantised already."""

import json
import shutil

import gguf
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from alignprop.models.formats import FORMATS, GGUF
from alignprop.models.loading import load_model
from alignprop.models.packed import PackedLinear, pack
from alignprop.models.prequantized import adopt
from alignprop.models.whole import set_precision
from alignprop.runs.manifest import base_model
from alignprop.settings.errors import ConfigError
from tests.helpers.tiny_pipelines import make_family

TYPES = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A tiny FLUX pipeline."""
    return make_family(tmp_path_factory.mktemp("flux"), "flux")


def weights_of(folder, part="transformer"):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def write_gguf(path, weights, kind):
    """Writes weights with the names of diffusers; matrices with rows of whole blocks are quantised."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in weights.items():
        values = tensor.numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_file_stays_packed_and_has_its_values(flux, tmp_path, kind):
    weights = weights_of(flux)
    write_gguf(tmp_path / "x.gguf", weights, TYPES[kind])
    model = load_model(str(flux), denoiser=str(tmp_path / "x.gguf"))
    layers = {n: m for n, m in model.denoiser.named_modules() if isinstance(m, PackedLinear)}
    assert layers and all(m.format == GGUF(int(TYPES[kind])) for m in layers.values())
    for name, tensor in weights.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(model.denoiser.state_dict()[name], tensor), name
        else:
            expected = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), TYPES[kind]), TYPES[kind])
            torch.testing.assert_close(layer.weight, torch.from_numpy(expected).view(tensor.shape))
    assert model.denoiser.to(torch.float32) is model.denoiser  # nothing left of diffusers' own quantiser


@pytest.mark.parametrize("of", ["whole", "channel"])
def test_a_file_with_scaled_weights_of_eight_bits(flux, tmp_path, of):
    weights = weights_of(flux)
    name = next(n for n, t in weights.items() if t.dim() == 2 and "to_q" in n)
    scale = torch.tensor(0.25) if of == "whole" else torch.linspace(0.1, 1, len(weights[name]))
    stored = {n: t.to(torch.float8_e4m3fn) if n == name else t for n, t in weights.items()}
    stored[name.removesuffix("weight") + "scale_weight"] = scale
    stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "x.safetensors")
    model = load_model(str(flux), denoiser=str(tmp_path / "x.safetensors"))
    found = model.denoiser.state_dict()
    assert found.keys() == weights.keys()
    expected = scale.view(-1, 1) * weights[name].to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("where", ["denoiser", "pipeline"])
def test_a_denoiser_from_another_folder(flux, tmp_path, where):
    other = make_family(tmp_path, "flux", seed=1)
    model = load_model(str(flux), denoiser=str(other / "transformer" if where == "denoiser" else other))
    expected = weights_of(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.denoiser.state_dict().items())
    assert all(
        torch.equal(tensor, load_file(flux / "text_encoder_2" / "model.safetensors")[name])
        for name, tensor in model.text_encoders[1].state_dict().items() if "embed_tokens" not in name
    )  # fmt: skip


def test_the_pipeline_s_own_denoiser_is_not_needed(flux, tmp_path):
    lacking = tmp_path / "lacking"
    shutil.copytree(flux, lacking)
    shutil.move(lacking / "transformer", tmp_path / "transformer")
    model = load_model(str(lacking), denoiser=str(tmp_path / "transformer"))
    assert type(model.denoiser) is FluxTransformer2DModel


def test_a_unet_from_a_file(pipeline_folder, tmp_path):
    save_file(weights_of(pipeline_folder, "unet"), tmp_path / "unet.safetensors")
    model = load_model(str(pipeline_folder), denoiser=str(tmp_path / "unet.safetensors"))
    assert type(model.denoiser) is UNet2DConditionModel


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "FileNotFound|no file|does not exist|not a valid|Error"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(20)), "Error"),
    ],
    ids=["absent", "damaged"],
)
def test_a_file_that_cannot_be_read_is_one_line(flux, tmp_path, write, reason):
    write(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match=rf"^pretrained\.denoiser = .*x\.gguf' could not be loaded .*({reason})") as e:
        load_model(str(flux), denoiser=str(tmp_path / "x.gguf"))
    assert "\n" not in str(e.value)


def test_a_single_file_has_its_own_denoiser(tmp_path):
    with pytest.raises(ConfigError, match=r"pretrained\.denoiser = 'y' needs a pipeline as pretrained\.model"):
        load_model(str(tmp_path / "x.safetensors"), denoiser="y")


def test_quantised_weights_cannot_be_trained_whole(flux, tmp_path):
    write_gguf(tmp_path / "x.gguf", weights_of(flux), TYPES.Q8_0)
    with pytest.raises(ConfigError, match="use_lora = False: the weights of the denoiser are quantised"):
        load_model(str(flux), denoiser=str(tmp_path / "x.gguf"), full=True)


# ---- layers of bitsandbytes, as diffusers and transformers make them on a GPU


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(128, 64).requires_grad_(False)


@pytest.mark.parametrize("nested", [True, False])
def test_a_layer_in_nf4_is_taken_over(nested):
    plain = linear()
    theirs = Linear4bit(128, 64, quant_type="nf4", compress_statistics=nested)
    theirs.weight = Params4bit(plain.weight.data, False, quant_type="nf4", compress_statistics=nested, module=theirs)
    theirs.bias = plain.bias
    network = nn.Sequential(theirs).to("cpu")
    x = torch.linspace(-1, 1, 3 * 128).view(3, 128).requires_grad_()
    expected = network(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    adopt(network, torch.float32, "pretrained.model")
    assert type(network[0]) is PackedLinear
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(network(x).sum(), x)[0], expected_gradient, rtol=1e-5, atol=1e-5)
    if nested:
        pack([plain], FORMATS["nf4"])
        assert torch.equal(plain.weight, network[0].weight)


def test_a_layer_in_eight_bits_is_taken_over():
    plain = linear()
    theirs = Linear8bitLt(128, 64, has_fp16_weights=False)
    theirs.load_state_dict(plain.state_dict())
    network = nn.Sequential(theirs).to("cpu")
    if theirs.weight.SCB is None:
        theirs.weight.data, theirs.weight.SCB, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(plain.weight.half())
    adopt(network, torch.float32, "pretrained.model")
    assert type(network[0]) is PackedLinear
    step = plain.weight.abs().amax(1, keepdim=True) / 127
    # Half a step, and bitsandbytes has read the weights in float16.
    assert ((network[0].weight - plain.weight).abs() <= 0.57 * step).all()


def test_another_format_of_four_bits_is_refused():
    theirs = Linear4bit(128, 64, quant_type="fp4")
    theirs.weight = Params4bit(linear().weight.data, False, quant_type="fp4", module=theirs)
    with pytest.raises(ConfigError, match="must be nf4 in blocks of 64, and are fp4 in blocks of 64"):
        adopt(nn.Sequential(theirs).to("cpu"), torch.float32, "pretrained.model")


def test_packed_weights_keep_the_types_of_their_tensors():
    network = nn.Sequential(linear(), nn.LayerNorm(64))
    pack([network[0]], FORMATS["nf4"])
    weight, types = network[0].weight, {name: tensor.dtype for name, tensor in network.named_buffers()}
    set_precision(network, torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in network.named_buffers()} == types
    assert network[1].weight.dtype == network[0].bias.dtype == torch.bfloat16
    assert torch.equal(network[0].weight, weight)


# ---- what a checkpoint says about its base


def test_a_quantised_base_is_told_from_others_by_its_values(flux, tmp_path):
    write_gguf(tmp_path / "x.gguf", weights_of(flux), TYPES.Q8_0)
    another = make_family(tmp_path / "b", "flux", seed=1)
    base, same, other = (
        base_model("x", load_model(str(pipeline), denoiser=file).denoiser)
        for pipeline, file in ((flux, None), (flux, str(tmp_path / "x.gguf")), (another, None))
    )
    assert json.dumps(base)
    assert len(base["weights"]) == len(same["weights"]) == len(other["weights"])
    near = [abs(a - b) for a, b in zip(base["weights"], same["weights"], strict=True)]
    far = [abs(a - b) for a, b in zip(base["weights"], other["weights"], strict=True)]
    assert max(near) < 0.02 < sum(far) / len(far)
