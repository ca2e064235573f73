"""The LoRA of a denoiser and of text encoders, as one: what is trained, saved, read and taken away again."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignprop.engine.seeding import generator
from alignprop.lora.adapters import (
    adapted_networks,
    add_adapter,
    get_adapter,
    set_adapter,
    trained_parameters,
    update_adapter,
)
from alignprop.lora.factors import LoraWeights, add_lora, get_lora, has_lora
from alignprop.lora.files import LORA_FILE, read_lora, save_lora
from alignprop.lora.soups import mix
from alignprop.models.loading import load_model
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from tests.helpers.tiny_pipelines import make_family

PROMPTS = ["a cat", "two dogs"]


@pytest.fixture
def model(pipeline_folder):
    return StableDiffusion.load(str(pipeline_folder))


def add_random(model, alpha=3.0, text_encoders=True):
    add_adapter(model, 3, alpha, None, seed=0, text_encoders=text_encoders)
    for name, parameter in trained_parameters(model).items():
        parameter.data.normal_(0, 0.3, generator=generator(name))


def embeds(model):
    return model.encode_prompts(PROMPTS)["prompt_embeds"]


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(model):
    before = embeds(model)
    add_adapter(model, 4, 4.0, None, seed=0, text_encoders=True)
    assert torch.equal(embeds(model), before)
    trained = trained_parameters(model)
    assert all("lora" in name and p.dtype == torch.float32 and p.requires_grad for name, p in trained.items())
    assert {name.partition(".")[0] for name in trained} >= {"text_encoder", "down_blocks"}
    assert adapted_networks(model) == [model.denoiser, model.text_encoders[0]]


def test_without_text_encoders_it_is_the_denoisers_lora_and_that_does_not_change_with_them(pipeline_folder):
    models = [StableDiffusion.load(str(pipeline_folder)) for _ in range(3)]
    add_lora(models[0].denoiser, 4, 4.0, models[0].lora_targets, seed=0)
    add_adapter(models[1], 4, 4.0, None, seed=0)
    add_adapter(models[2], 4, 4.0, None, seed=0, text_encoders=True)
    alone, without, with_text = get_lora(models[0].denoiser), get_adapter(models[1]), get_adapter(models[2])
    assert alone.tensors.keys() == without.tensors.keys() < with_text.tensors.keys()
    for name, tensor in alone.tensors.items():
        assert torch.equal(without.tensors[name], tensor) and torch.equal(with_text.tensors[name], tensor)
    assert not has_lora(models[1].text_encoders[0]) and adapted_networks(models[1]) == [models[1].denoiser]


def test_two_encoders_do_not_begin_alike(model):
    model.lora_encoders["text_encoder_2"] = copy.deepcopy(model.text_encoders[0])
    add_adapter(model, 2, 2.0, None, seed=0, text_encoders=True)
    tensors = get_adapter(model).tensors
    factors = [name for name in tensors if name.startswith("text_encoder.") and "lora_A" in name]
    assert len(factors) == 8
    assert not any(torch.equal(tensors[n], tensors[n.replace("encoder.", "encoder_2.", 1)]) for n in factors)


def test_a_model_whose_files_have_no_place_for_it(tmp_path):
    folder = str(make_family(tmp_path / "p", "z_image"))
    message = r"^train_text_encoder = True: LoRA files of a ZImagePipeline cannot hold text encoders$"
    with pytest.raises(ConfigError, match=message):
        add_adapter(load_model(folder, resolution=16), 2, 2.0, None, seed=0, text_encoders=True)
    (tmp_path / "p" / "transformer" / "config.json").unlink()  # it is known before anything is loaded
    with pytest.raises(ConfigError, match=message):
        load_model(folder, train_text_encoder=True)


@pytest.mark.parametrize("alpha", [3.0, 6.0])
def test_a_saved_file_reloads_exactly_here_and_in_a_plain_pipeline(model, pipeline_folder, tmp_path, alpha):
    base = embeds(model)
    add_random(model, alpha)
    expected, whole = embeds(model), get_adapter(model)
    assert (expected - base).abs().max() > 0.05
    save_lora(model, whole, tmp_path)

    ours = StableDiffusion.load(str(pipeline_folder))
    read = read_lora(tmp_path, ours)
    assert read.scale == alpha / 3 and read.tensors.keys() == whole.tensors.keys()
    set_adapter(ours, read)
    assert torch.equal(embeds(ours), expected) and not trained_parameters(ours)
    plain = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    plain.load_lora_weights(tmp_path)
    theirs, _ = plain.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-6)


def test_its_names_are_those_that_every_version_of_transformers_is_given(model, tmp_path):
    add_random(model)
    save_lora(model, get_adapter(model), tmp_path)
    names = load_file(tmp_path / LORA_FILE).keys()
    encoders = [name for name in names if name.startswith("text_encoder.")]
    assert len(encoders) == 2 * 4 * 2 and all(name.startswith("text_encoder.text_model.encoder.") for name in encoders)
    assert all(name.startswith("unet.") for name in names if name not in encoders)


@pytest.mark.parametrize("rename", [
    lambda n: n.replace("text_model.", ""),
    lambda n: n.replace("q_proj.lora_A", "to_q_lora.down").replace("q_proj.lora_B", "to_q_lora.up"),
    lambda n: n.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
])  # fmt: skip
def test_older_names_of_a_text_encoders_layers_are_read(model, tmp_path, rename):
    add_random(model)
    save_lora(model, get_adapter(model), tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    renamed = {rename(name) if name.startswith("text_encoder") else name: tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / LORA_FILE)
    assert read_lora(tmp_path).tensors.keys() == get_adapter(model).tensors.keys()


def test_none_takes_all_of_it_away_and_prompts_are_remembered_again(model):
    base = embeds(model)
    add_random(model)
    assert not model.knows(PROMPTS) and not torch.equal(embeds(model), base)
    set_adapter(model, None)
    assert model.knows(PROMPTS) and torch.equal(embeds(model), base) and not adapted_networks(model)


def test_a_text_encoder_of_another_kind_is_named(model):
    model.lora_encoders["text_encoder"] = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"^train_text_encoder: the text_encoder has no layer whose name ends in .'q"):
        add_adapter(model, 2, 2.0, None, seed=0, text_encoders=True)


def test_nothing_goes_back_into_an_empty_prompt_that_is_not_used(model, monkeypatch):
    add_random(model)
    ones, encoded, encode = torch.ones_like(embeds(model)), [], model.encode
    monkeypatch.setattr(model, "encode", lambda prompts: encoded.extend(prompts) or encode(prompts))
    model.backward_prompts(PROMPTS, {"prompt_embeds": ones, "negative_prompt_embeds": 0 * ones})
    assert encoded == PROMPTS
    model.backward_prompts(PROMPTS, {"prompt_embeds": ones, "negative_prompt_embeds": ones})
    assert encoded[2:] == [PROMPTS[0], "", PROMPTS[1], ""]


def test_prompts_are_encoded_anew_while_an_adapter_may_change(model):
    add_random(model)
    first = embeds(model)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter *= 1.5
    assert (embeds(model) - first).abs().max() > 0.01


def test_an_adapter_with_text_encoders_is_replaced_by_one_without(model, pipeline_folder):
    base = embeds(model)
    add_random(model)
    whole = get_adapter(model)
    alone = LoraWeights({k: t for k, t in whole.tensors.items() if "text_encoder" not in k}, whole.scale)
    set_adapter(model, alone)
    assert torch.equal(embeds(model), base) and adapted_networks(model) == [model.denoiser]
    set_adapter(model, mix(whole, alone, 0.5, "delta"))
    halved = embeds(model)
    set_adapter(model, LoraWeights(whole.tensors, 0.5 * whole.scale))
    torch.testing.assert_close(embeds(model), halved, rtol=1e-5, atol=1e-6)


def test_what_has_no_place_in_the_model_is_refused(model):
    add_random(model)
    weights = get_adapter(model)
    set_adapter(model, None)
    other = {name.replace("text_encoder.", "text_encoder_2."): tensor for name, tensor in weights.tensors.items()}
    with pytest.raises(ConfigError, match=r"^LoRA: \d+ of its \d+ keys match a layer .*'text_encoder_2\.text_model"):
        set_adapter(model, LoraWeights(other, 1.0))
    later = {name.replace("layers.0", "layers.7"): tensor for name, tensor in weights.tensors.items()}
    with pytest.raises(ConfigError, match=r"^LoRA: 8 of its 16 keys match a layer of this model's text_encoder, "):
        set_adapter(model, LoraWeights(later, 1.0))
    assert not adapted_networks(model), "what is refused must not be half there"


@pytest.mark.parametrize(("trained", "found"), [(True, "no"), (False, "a")])
def test_a_checkpoint_with_other_parts_is_refused_at_resume(model, trained, found):
    add_random(model)
    weights = get_adapter(model)
    alone = LoraWeights({k: t for k, t in weights.tensors.items() if "text_encoder" not in k}, weights.scale)
    set_adapter(model, None)
    add_adapter(model, 3, 3.0, None, seed=1, text_encoders=trained)
    other, same = (alone, weights) if trained else (weights, alone)
    message = f"^resume_from: the checkpoint has {found} LoRA for the text_encoder, .* train_text_encoder = {trained}"
    with pytest.raises(ConfigError, match=message):
        update_adapter(model, other)
    update_adapter(model, same)
    assert all(torch.equal(get_adapter(model).tensors[name], tensor) for name, tensor in same.tensors.items())
    assert len(trained_parameters(model)) == len(same.tensors)


def test_parts_may_have_scales_of_their_own(model, tmp_path):
    add_random(model, alpha=6.0)
    save_lora(model, get_adapter(model), tmp_path)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    header["text_encoder.lora_alpha"] *= 2
    save_file(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE, {"lora_adapter_metadata": json.dumps(header)})
    before, found = get_adapter(model), read_lora(tmp_path)
    for module in found.modules:
        factor = 2 if module.startswith("text_encoder") else 1
        torch.testing.assert_close(found.delta(module), factor * before.delta(module))


def test_an_encoder_in_half_precision_has_a_float32_adapter(pipeline_folder):
    half = StableDiffusion.load(str(pipeline_folder), dtype=torch.bfloat16)
    add_random(half)
    assert {p.dtype for p in trained_parameters(half).values()} == {torch.float32}
    assert embeds(half).dtype == torch.bfloat16
    into = {"prompt_embeds": torch.ones_like(embeds(half)), "negative_prompt_embeds": torch.ones_like(embeds(half))}
    half.backward_prompts(PROMPTS, into)
    gradients = [p.grad for name, p in trained_parameters(half).items() if "text_encoder" in name]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    assert all(p.grad is None for p in half.denoiser.parameters())
