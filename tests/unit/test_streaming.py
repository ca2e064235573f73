"""Weights that come from the host layer by layer: the same bits, in two slots, in the order of the calls."""

import copy

import pytest
import torch
from torch import nn

from alignprop.memory.accounting import Account
from alignprop.memory.residency import Residency
from alignprop.memory.streaming import Stream
from alignprop.models.formats import FORMATS
from alignprop.models.packed import pack, packable

CPU = torch.device("cpu")


def chain(count=5, width=64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(width, width) for _ in range(count)]
    return nn.Sequential(*layers).requires_grad_(False)


def gradient(network, x):
    x = x.clone().requires_grad_()
    y = network(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_streaming_changes_no_bit(name):
    network, x = chain(), torch.linspace(-1, 1, 2 * 64).view(2, 64)
    if name:
        pack(packable(network), FORMATS[name])
    expected = gradient(copy.deepcopy(network), x)
    Stream(CPU, [network])
    for _ in range(3):  # without and with what it has learned of the order
        assert all(map(torch.equal, gradient(network, x), expected))


def test_convolutions_stream_in_their_memory_format():
    network = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 32, 3)).requires_grad_(False)
    network.to(memory_format=torch.channels_last)
    x = torch.linspace(-1, 1, 32 * 64).view(1, 32, 8, 8).to(memory_format=torch.channels_last)
    expected = network(x)
    Stream(CPU, [network])
    assert torch.equal(network(x), expected)
    assert network[0].weight_now().is_contiguous(memory_format=torch.channels_last)


def test_the_next_layer_is_copied_while_one_computes(monkeypatch):
    network = chain(4)
    stream = Stream(CPU, [network])
    x = torch.zeros(1, 64)
    gradient(network, x)
    gradient(network, x)
    asked, fetch = [], stream.fetch
    ready = lambda layer: any(slot and slot[0] is layer for slot in (stream._here, stream._coming))  # noqa: E731

    def note(layer):
        asked.append((stream.layers.index(layer), ready(layer)))
        return fetch(layer)

    monkeypatch.setattr(stream, "fetch", note)
    before = stream.moved
    gradient(network, x)
    assert asked == [(i, True) for i in (0, 1, 2, 3, 3, 2, 1, 0)]
    assert stream.moved - before == 6 * 64 * 64 * 4  # at both ends the layer is still there


def test_a_wrong_guess_changes_nothing():
    network, other = chain(4), chain(4)
    stream = Stream(CPU, [network])
    x = torch.linspace(-1, 1, 64).view(1, 64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        which = torch.randint(4, (3,), generator=generator).tolist()
        ours = theirs = x
        for i in which:
            ours, theirs = network[i](ours), other[i](theirs)
        assert torch.equal(ours, theirs)
    assert stream.moved > 0


def test_two_slots_of_the_largest_layer_are_all_that_is_on_the_device():
    network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 256, bias=False)).requires_grad_(False)
    Stream(torch.device("meta"), [network.to("meta")])
    x = torch.empty(1, 64, device="meta")
    with Account("meta") as account, torch.no_grad():
        network[0](x)
        network[1](x)
    assert account.bytes == 2 * 256 * 64 * 4  # without the outputs, which are gone


def test_the_bytes_that_move_are_counted():
    network, size = chain(3), 64 * 64 * 4
    residency = Residency(CPU, {"denoise": [network], "decode": [chain(1)]}, "stream", copy=True)
    x = torch.zeros(1, 64)
    with residency("denoise"), torch.no_grad():
        network(x)
        network(x)
        before = residency.streamed
        network(x)
    assert residency.streamed - before == 3 * size
    assert residency.moved == 3 * 64 * 4  # the biases come with the phase


def test_a_weight_can_be_read_while_another_one_is_in_use():
    network = chain(3)
    values = [layer.weight.clone() for layer in network]
    stream = Stream(CPU, [network])
    read = [layer.weight for layer in network]
    network(torch.zeros(1, 64))
    assert all(map(torch.equal, read, values))
    assert stream.moved == 3 * 64 * 64 * 4  # readings are not the stream's


def test_a_stream_takes_over_the_layers_of_another_one():
    network = chain(3)
    first = Stream(CPU, [network])
    x = torch.linspace(-1, 1, 64).view(1, 64)
    expected = network(x)
    before = first.moved
    second = Stream(CPU, [network])
    assert torch.equal(network(x), expected)
    assert first.moved == before and second.moved == 3 * 64 * 64 * 4
