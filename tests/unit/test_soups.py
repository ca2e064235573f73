import pytest
import torch

from alignprop.engine.seeding import generator
from alignprop.lora.factors import LoraWeights
from alignprop.lora.soups import mix
from alignprop.settings.errors import ConfigError

LAYERS = ("block.to_q", "block.to_v")


def adapter(seed, rank=2, scale=1.0, layers=LAYERS):
    tensors = {}
    for layer in layers:
        g = generator(seed, layer)
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, 5, generator=g)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(7, rank, generator=g)
    return LoraWeights(tensors, scale)


def delta(weights, layer):
    a, b = (weights.tensors.get(f"{layer}.lora_{f}.weight") for f in "AB")
    return torch.zeros(7, 5) if a is None else weights.scale * b @ a


@pytest.mark.parametrize("mode", ["delta", "factors"])
def test_end_points_are_the_checkpoints_themselves(mode):
    first, second = adapter(1), adapter(2)
    assert mix(first, second, 1.0, mode) is first
    assert mix(first, second, 0.0, mode) is second
    assert mix(first, None, 0.0, mode) is None


@pytest.mark.parametrize("c", [0.25, 0.7])
def test_delta_mixes_the_weight_changes(c):
    first, second = adapter(1, rank=2, scale=0.5), adapter(2, rank=3, scale=2.0)
    mixed = mix(first, second, c, "delta")
    for layer in LAYERS:
        torch.testing.assert_close(delta(mixed, layer), c * delta(first, layer) + (1 - c) * delta(second, layer))


def test_delta_with_the_base_model_is_linear_in_c():
    first = adapter(1)
    torch.testing.assert_close(delta(mix(first, None, 0.3, "delta"), LAYERS[0]), 0.3 * delta(first, LAYERS[0]))


def test_delta_keeps_layers_that_only_one_checkpoint_has():
    first, second = adapter(1, layers=LAYERS[:1]), adapter(2)
    mixed = mix(first, second, 0.4, "delta")
    torch.testing.assert_close(delta(mixed, LAYERS[1]), 0.6 * delta(second, LAYERS[1]))


def test_factors_with_the_base_model_are_quadratic_in_c():
    first = adapter(1)
    torch.testing.assert_close(delta(mix(first, None, 0.3, "factors"), LAYERS[0]), 0.09 * delta(first, LAYERS[0]))


def test_factors_mix_a_and_b_separately():
    first, second = adapter(1), adapter(2)
    mixed = mix(first, second, 0.5, "factors")
    for name, tensor in mixed.tensors.items():
        torch.testing.assert_close(tensor, (first.tensors[name] + second.tensors[name]) / 2)


def test_factors_of_different_rank_are_refused():
    with pytest.raises(ConfigError, match="use 'delta'"):
        mix(adapter(1, rank=2), adapter(2, rank=3), 0.5, "factors")
