"""Layers that multiply in 8 bits, against the products of the same rounded matrices in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alignprop.memory import quantize as quantizing
from alignprop.memory.accounting import Account, on_meta
from alignprop.memory.streaming import Stream
from alignprop.models.formats import FORMATS
from alignprop.models.packed import PackedLinear, pack, packable
from alignprop.models.products import NarrowLinear, multiply_in_8_bits
from alignprop.settings.errors import ConfigError
from tests.helpers.shaped import flux_shaped, gradients, normal, random_network, sdxl_shaped

NARROW = ("int8", "fp8")


def narrow_layer(name, dtype=torch.float32, out=48, bias=True):
    layer = nn.Linear(64, out, bias=bias).requires_grad_(False).to(dtype)
    layer.weight.data = normal(out, 64, seed=5).to(dtype)
    pack([layer], FORMATS[name])
    multiply_in_8_bits([layer])
    return layer


def rounded(rows, name):
    """Rows rounded to 8 bits, each by its own scale, in float64."""
    fmt, rows = FORMATS[name], rows.double()
    scale = rows.abs().amax(-1, keepdim=True) / fmt.largest
    scaled = rows / scale
    return (scaled.round() if name == "int8" else scaled.float().to(torch.float8_e4m3fn).double()) * scale


@pytest.mark.parametrize("name", NARROW)
def test_the_output_is_the_product_of_the_rounded_input_and_the_packed_weight(name):
    layer, x = narrow_layer(name), normal(2, 20, 64)
    expected = rounded(x, name) @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.requires_grad_()))


@pytest.mark.parametrize("name", NARROW)
def test_the_gradient_is_the_product_of_the_rounded_gradient_and_the_packed_weight(name):
    layer, x, grad = narrow_layer(name), normal(2, 20, 64).requires_grad_(), normal(2, 20, 48, seed=1)
    (found,) = torch.autograd.grad(layer(x), x, grad)
    # A channel's scale is multiplied into the gradient before it is rounded.
    scale = layer.packed_scale.view(-1)
    expected = rounded(grad * scale, name) @ (layer.weight.double() / scale.double()[:, None])
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NARROW)
def test_half_precision_neither_overflows_nor_rounds_more_than_itself(name, dtype):
    layer, x = narrow_layer(name, dtype), (100 * normal(20, 64)).to(dtype).requires_grad_()
    y = layer(x)
    (found,) = torch.autograd.grad(y, x, 100 * torch.ones_like(y))
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    of_input = 100 * torch.ones(20, 48).double() @ layer.weight.double()
    assert y.dtype == found.dtype == dtype
    for ours, theirs in ((y, exact), (found, of_input)):
        assert F.cosine_similarity(ours.double().flatten(), theirs.flatten(), dim=0) > 0.999
        assert 0.98 < ours.double().norm() / theirs.norm() < 1.02


@pytest.mark.parametrize("x", [normal(16, 64), normal(1, 64)], ids=["16 rows", "1 row"])
def test_a_few_rows_are_multiplied_as_by_a_packed_layer(x):
    layer = narrow_layer("int8")
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)


def test_odd_widths_are_multiplied_as_by_a_packed_layer():
    layer, x = narrow_layer("int8", out=41), normal(20, 64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("name", NARROW)
def test_rows_of_zeros_give_the_bias(name):
    layer = narrow_layer(name)
    assert torch.equal(layer(torch.zeros(20, 64)), layer.bias.expand(20, -1))


@pytest.mark.parametrize("name", NARROW)
def test_a_gpu_gets_rows_and_columns_in_its_order(name, monkeypatch):
    """The tokens of one picture can be a view that has its channels first in memory, and so can their gradient."""
    seen, narrow = [], FORMATS[name]
    layer = narrow_layer(name, out=64).to("meta")
    to_int8, to_fp8 = torch._int_mm, torch._scaled_mm

    def product(*args, **kwargs):
        seen.append([(t.stride(0) >= t.stride(1)) for t in args[:2]])
        return (to_int8 if narrow.dtype == torch.int8 else to_fp8)(*args, **kwargs)

    monkeypatch.setattr(torch, "_int_mm", product)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    x = torch.zeros(1, 64, 5, 7, device="meta").permute(0, 2, 3, 1).reshape(1, 35, 64).requires_grad_()
    y = layer(x).permute(0, 2, 1).reshape(1, 64, 5, 7)
    y.backward(torch.zeros(1, 64, 5, 7, device="meta"))
    assert seen == [[True, False], [True, False]]


def test_only_layers_of_8_bits_multiply_so():
    layers = nn.ModuleList([nn.Linear(64, 64), nn.Conv2d(64, 64, 3), nn.Linear(64, 64)]).requires_grad_(False)
    pack(layers[:2], FORMATS["int8"])
    pack(layers[2:], FORMATS["int4"])
    multiply_in_8_bits(layers)
    assert [isinstance(layer, NarrowLinear) for layer in layers] == [True, False, False]
    assert type(layers[2]) is PackedLinear


@pytest.mark.parametrize("facts", [flux_shaped(2, 1), sdxl_shaped(32, 1)], ids=["flux", "sdxl"])
@pytest.mark.parametrize(("name", "least"), [("int8", 0.99), ("fp8", 0.97)])
def test_the_gradient_of_a_network_stays_near(name, least, facts):
    network, x = random_network(facts)
    x = x.repeat_interleave(2, 0)[:2]
    _, expected = gradients(network, x)
    layers = packable(network)
    pack(layers, FORMATS[name])
    _, weights_only = gradients(network, x)
    multiply_in_8_bits(layers)
    _, found = gradients(network, x)
    assert not torch.equal(found, weights_only)
    assert F.cosine_similarity(found, expected, dim=0) > least


@pytest.mark.parametrize("name", NARROW)
def test_a_layer_that_streams_multiplies_the_same(name):
    layer, x = narrow_layer(name), normal(20, 64).requires_grad_()
    expected = layer(x), torch.autograd.grad(layer(x).sum(), x)[0]
    Stream(torch.device("cpu"), [layer])
    assert torch.equal(layer(x), expected[0])
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], expected[1])


@pytest.mark.parametrize("name", NARROW)
def test_on_meta_tensors_operations_count_as_on_real_ones(name):
    layer = narrow_layer(name)
    counts = []
    for device, one in (("cpu", layer), ("meta", on_meta(layer))):
        x = torch.zeros(20, 64, device=device).requires_grad_()
        with Account(device) as account:
            one(x).sum().backward()
        counts.append(account.flops)
    assert counts[0] == counts[1] == {"": 2 * 2 * 20 * 64 * 48}


@pytest.mark.parametrize(("name", "capability", "named"), [("fp8", (8, 6), "8.9"), ("int8", (7, 0), "7.5")])
def test_an_older_gpu_is_refused(monkeypatch, name, capability, named):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ConfigError, match=rf"needs a GPU of compute capability {named}; this one has"):
        quantizing._check_gpu(name, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    quantizing._check_gpu(name, torch.device("cuda"))
