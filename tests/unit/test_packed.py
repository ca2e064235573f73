"""Formats of weights against their definitions, and packed layers against autograd through the unpacked weights."""

import gguf
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb
from torch import nn

from alignprop.lora.factors import add_lora, check_modules, get_lora, trainable_parameters
from alignprop.memory.accounting import BLOCK, Account, on_meta
from alignprop.memory.checkpointing import checkpoint_blocks
from alignprop.memory.lean import make_lean
from alignprop.models import packed
from alignprop.models.formats import FORMATS, GGUF, Plain
from alignprop.models.packed import PackedConv2d, PackedLinear, pack, packable
from alignprop.settings.fields.rules import QUANTIZED
from tests.helpers.shaped import call, flux_shaped, gradients, normal, random_network, sdxl_shaped

BITS = {"int8": 8, "fp8": 8, "int4": 4.5, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
FLUX, SDXL = flux_shaped(heads=2, layers=1), sdxl_shaped(width=32, layers=1)


def unpacked(name, weight):
    return FORMATS[name].unpack(FORMATS[name].pack(weight), weight.shape, weight.dtype)


# ---- formats


@pytest.mark.parametrize("shape", [(32, 64), (40, 32, 3, 3)])
def test_eight_bits_round_to_the_nearest_of_255_values_of_each_channel(shape):
    weight = normal(*shape)
    found = unpacked("int8", weight)
    step = weight.flatten(1).abs().amax(1).view(-1, *[1] * (len(shape) - 1)) / 127
    assert ((found - weight).abs() <= 0.5001 * step).all()
    assert (found - weight).abs().max() > 0.4 * step.min()


def test_floats_of_eight_bits_keep_four_significant_ones():
    weight = normal(32, 64)
    found = unpacked("fp8", weight)
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert ((found - weight).abs() <= weight.abs() / 16 * 1.001 + scale * 2.0**-10).all()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_largest_weight_of_a_channel_is_kept(name):
    weight = normal(32, 64)
    largest = weight.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(unpacked(name, weight).gather(1, largest), weight.gather(1, largest))


def test_four_bits_round_to_the_nearest_of_16_values_between_least_and_largest_of_64_weights():
    weight = normal(32, 128)
    groups, found = weight.view(-1, 64), unpacked("int4", weight).view(-1, 64)
    step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
    assert ((found - groups).abs() <= 0.5001 * step).all()
    torch.testing.assert_close(found.amin(1), groups.amin(1))
    torch.testing.assert_close(found.amax(1), groups.amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_that_of_bitsandbytes(dtype):
    weight = normal(64, 320).to(dtype)
    theirs = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4", blocksize=64)
    assert torch.equal(unpacked("nf4", weight), bnb.dequantize_4bit(*theirs))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_types_of_gguf_are_those_of_its_package(kind):
    number, weight = gguf.GGMLQuantizationType[kind], normal(32, 64)
    values = gguf.quants.quantize(weight.numpy(), number)
    found = GGUF(int(number)).unpack({"values": torch.from_numpy(values)}, weight.shape, torch.float32)
    torch.testing.assert_close(found, torch.from_numpy(gguf.quants.dequantize(values, number)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_channel_of_zeros_stays_zero(name, dtype):
    weight = torch.zeros(32, 64, dtype=dtype)
    assert torch.equal(unpacked(name, weight), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_weight_has_as_many_bits_as_its_format_says(name):
    (layer,) = packable(nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16).requires_grad_(False))
    pack([layer], FORMATS[name])
    bits = 8 * sum(b.nbytes for b in layer.buffers()) / layer.weight.numel()
    assert bits == pytest.approx(BITS[name], rel=0.01)
    assert not list(layer.parameters())


@pytest.mark.parametrize("name", FORMATS)
def test_on_meta_tensors_a_packed_weight_has_the_same_bytes(name):
    layer = nn.Linear(128, 64).requires_grad_(False)
    planned = on_meta(layer)
    for one in (layer, planned):
        pack([one], FORMATS[name])
    assert [(b.shape, b.dtype) for b in planned.buffers()] == [(b.shape, b.dtype) for b in layer.buffers()]
    assert planned.weight.is_meta and planned.weight.shape == layer.weight.shape
    assert torch.isfinite(unpacked(name, normal(64, 64))).all()  # what bitsandbytes remembers has data afterwards


def test_the_formats_are_those_that_the_configuration_knows():
    assert QUANTIZED.choices == ("", *FORMATS)


# ---- layers


@pytest.mark.parametrize("facts", [FLUX, SDXL], ids=["flux", "sdxl"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_is_that_of_autograd_through_the_unpacked_weights(name, facts):
    network, x = random_network(facts)
    add_lora(network, 2, 4.0, ["to_q", "to_v"], seed=0)
    for i, parameter in enumerate(trainable_parameters(network).values()):
        parameter.data = normal(*parameter.shape, seed=i) / 4
    layers = packable(network)
    plain = [layer.weight for layer in layers]
    pack(layers, FORMATS[name])
    y, found = gradients(network, x)
    kinds = {PackedLinear: nn.Linear, PackedConv2d: nn.Conv2d}
    for layer, weight in zip(layers, plain, strict=True):
        weight.data = layer.weight
        layer.__class__ = kinds[type(layer)]
        layer.weight = weight
    y_plain, expected = gradients(network, x)
    torch.testing.assert_close(y, y_plain, rtol=0, atol=1e-5 * y_plain.abs().max().item())
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("facts", [FLUX, SDXL], ids=["flux", "sdxl"])
@pytest.mark.parametrize(("name", "least"), [("int8", 0.9995), ("fp8", 0.995), ("int4", 0.95), ("nf4", 0.95)])
def test_the_gradient_is_near_that_of_the_unquantised_network(name, least, facts):
    network, x = random_network(facts)
    _, expected = gradients(network, x)
    pack(packable(network), FORMATS[name])
    _, found = gradients(network, x)
    assert least < F.cosine_similarity(found, expected, dim=0) < 1
    assert 0.9 < found.norm() / expected.norm() < 1.1


@pytest.mark.parametrize(
    ("make", "x"),
    [(lambda: nn.Linear(64, 64), (2, 9, 64)), (lambda: nn.Conv2d(64, 64, 3, stride=2, padding=1), (2, 64, 8, 8))],
    ids=["linear", "convolution"],
)
def test_a_packed_layer_keeps_nothing_for_the_backward_pass(make, x):
    layer = make().requires_grad_(False)
    pack([layer], FORMATS["int8"])
    x = normal(*x).requires_grad_()
    with Account("cpu") as account:
        y = layer(x)
        assert account.bytes == -(-y.nbytes // BLOCK) * BLOCK
        y.sum().backward()
    assert x.grad is not None


def test_blocks_are_checkpointed_and_lean_with_packed_layers():
    network, x = random_network(FLUX)
    pack(packable(network), FORMATS["int4"])
    expected = gradients(network, x)
    make_lean(network)
    checkpoint_blocks(network)
    for ours, theirs in zip(gradients(network, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_lean_network_unpacks_each_weight_once_a_call(monkeypatch):
    """Also the norms' linear layers, which lean layers look at."""
    network, x = random_network(FLUX)
    layers = packable(network)
    pack(layers, FORMATS["int8"])
    make_lean(network)
    monkeypatch.setattr(packed.Packed, "weight", property(lambda layer: pytest.fail("it was unpacked")))
    count, unpack = [], packed.Packed.weight_now
    monkeypatch.setattr(packed.Packed, "weight_now", lambda layer: count.append(layer) or unpack(layer))
    call(network, x)
    assert len(count) == len(layers)


def test_narrow_unusual_and_trained_layers_stay_as_they_are(monkeypatch):
    kept = [
        nn.Linear(16, 64), nn.Linear(64, 16), nn.Conv2d(4, 64, 3), nn.Linear(64, 64, dtype=torch.float32),
        nn.Conv2d(64, 64, 3, padding="same"), nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.MultiheadAttention(64, 2), nn.Embedding(64, 64), nn.Linear(33, 35),
    ]  # fmt: skip
    network = nn.ModuleList(kept).requires_grad_(False)
    kept[3].requires_grad_(True)
    assert packable(network) == []
    kept[3].requires_grad_(False)
    assert packable(network) == [kept[3]]


def test_a_lora_is_never_packed():
    network, _ = random_network(FLUX)
    add_lora(network, 32, 32.0, ["to_q"], seed=0)
    for parameter in trainable_parameters(network).values():
        parameter.requires_grad_(False)
    lora = {layer for name, layer in network.named_modules() if "lora_" in name}
    assert lora and not lora & {*packable(network)}


def test_a_lora_is_checked_against_packed_layers_without_unpacking_them(monkeypatch):
    network, _ = random_network(FLUX)
    add_lora(network, 2, 2.0, ["to_q"], seed=0)
    weights = get_lora(network)
    other, _ = random_network(FLUX)
    pack(packable(other), FORMATS["int8"])
    monkeypatch.setattr(packed.Packed, "weight", property(lambda layer: pytest.fail("it was unpacked")))
    check_modules(other, weights)


def test_a_plain_format_changes_nothing():
    network, x = random_network(SDXL)
    expected = gradients(network, x)
    make_lean(network)  # convolutions then compute their gradient in the same way
    lean = gradients(network, x)
    pack(packable(network), Plain())
    assert all(map(torch.equal, gradients(network, x), lean))
    torch.testing.assert_close(lean, expected, rtol=1e-4, atol=1e-5)
