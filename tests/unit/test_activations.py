"""Activations that wait on the host: the same gradients, and fewer bytes on the device."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from alignprop.engine.activations import KeptOnHost, decode_activations_on
from alignprop.memory.accounting import Account, on_meta
from alignprop.memory.checkpointing import checkpoint_layers
from alignprop.memory.lean import make_lean
from alignprop.models.loading import load_model
from config.align_prop import TINY
from tests.helpers.shaped import normal

LATENTS = (1, 4, 16, 16)


@pytest.fixture(scope="module")
def vae():
    return load_model(str(TINY / "pipeline")).decoder


def decode(vae, latents, context):
    """The gradient of a decode whose activations are kept as the context says, and the peak of the decode's bytes."""
    latents = latents.detach().requires_grad_()
    with Account(latents.device.type) as account:
        with context:
            y = vae.decode(latents).sample.square().sum()
        (found,) = torch.autograd.grad(y, latents)
    return found, account.peak


@pytest.mark.parametrize("layers", ["plain", "lean", "checkpointed"])
def test_the_gradient_has_the_same_bits(layers):
    vae = load_model(str(TINY / "pipeline")).decoder
    if layers != "plain":
        make_lean(vae)
    if layers == "checkpointed":
        checkpoint_layers(vae)
    latents = normal(*LATENTS)
    assert torch.equal(decode(vae, latents, KeptOnHost())[0], decode(vae, latents, nullcontext())[0])


def test_activations_are_copied_and_weights_are_not():
    layer, x = nn.Linear(8, 8).requires_grad_(False), normal(2, 8).requires_grad_()
    with KeptOnHost():
        y = layer(x.tanh()).tanh()
    weight = y.grad_fn.next_functions[0][0]._saved_mat2
    assert weight.data_ptr() == layer.weight.data_ptr()
    with torch.no_grad():
        kept = y.clone()
        y.zero_()  # what the backward pass reads is a copy
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = ((1 - kept**2) @ layer.weight) * (1 - x.tanh() ** 2)
    torch.testing.assert_close(found, expected)


def test_a_device_holds_the_activations_of_about_one_layer():
    """The layers save 10 tensors of one megabyte. Beside an input and a gradient, two of them are enough."""
    network = nn.Sequential(*[nn.Tanh() for _ in range(10)])
    peaks = {}
    for name, context in (("device", nullcontext()), ("host", KeptOnHost())):
        x = torch.empty(2**18, device="meta", requires_grad=True)
        with Account("meta") as account:
            with context:
                y = network(x)
            y.backward(torch.empty_like(x))
        peaks[name] = account.peak
    assert peaks["device"] >= 11 * 2**20
    assert peaks["host"] <= 5 * 2**20


def test_a_decode_needs_less_memory(vae):
    planned = on_meta(vae)
    latents = torch.empty(LATENTS, device="meta")
    without, with_host = (decode(planned, latents, context)[1] for context in (nullcontext(), KeptOnHost()))
    assert with_host < 0.4 * without


def test_on_a_cpu_host_and_device_are_the_same():
    assert isinstance(decode_activations_on("host", torch.device("cpu")), nullcontext)
    assert isinstance(decode_activations_on("device", torch.device("cuda")), nullcontext)
    assert isinstance(decode_activations_on("host", torch.device("cuda")), KeptOnHost)
