import pytest

from alignprop.lora.networks import adaptable_networks, layer, locate, name_in_file
from tests.helpers.tiny_families import TINY, tiny_model


@pytest.mark.parametrize("family", list(TINY))
def test_every_layer_is_found_by_its_name_in_a_file(family):
    model = tiny_model(TINY[family])
    for part, network in adaptable_networks(model).items():
        names = [name for name, _ in network.named_modules() if name]
        assert names
        for name in names:
            assert locate(model, name_in_file(model, part, name)) == (part, name)
            assert layer(model, name_in_file(model, part, name)) is network.get_submodule(name)


def test_what_is_of_no_part_counts_as_the_denoisers():
    model = tiny_model(TINY["flux"])
    assert locate(model, "text_encoder_2.encoder.x") == ("", "text_encoder_2.encoder.x")


def test_the_projection_is_beside_the_wrapper_and_not_in_it():
    model = tiny_model(TINY["sdxl"])
    assert name_in_file(model, "text_encoder_2", "text_projection") == "text_encoder_2.text_projection"
    assert name_in_file(model, "text_encoder", "encoder.layers.0") == "text_encoder.text_model.encoder.layers.0"
