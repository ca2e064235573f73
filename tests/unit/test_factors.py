import pytest
import torch

from alignprop.engine.seeding import generator
from alignprop.lora.factors import LoraWeights, add_lora, get_lora, set_lora, trainable_parameters, update_lora
from alignprop.method.guidance import GuidedDenoiser
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def model(pipeline_folder):
    return StableDiffusion.load(str(pipeline_folder))


def add_random(model, rank=3, alpha=3.0, seed=0):
    add_lora(model.denoiser, rank, alpha, TARGETS, seed)
    for name, parameter in trainable_parameters(model.denoiser).items():
        parameter.data.normal_(0, 0.5, generator=generator(name, seed))


@torch.no_grad()
def predict(model, with_lora=True):
    latents = model.init_latents([generator("latents")])
    return GuidedDenoiser(model, 5.0)(latents, torch.tensor(500), model.encode_prompts(["a cat"]))


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(model):
    before = predict(model)
    add_lora(model.denoiser, 4, 4.0, TARGETS, seed=0)
    assert torch.equal(predict(model), before)
    trained = trainable_parameters(model.denoiser)
    assert trained and all("lora" in name and p.dtype == torch.float32 for name, p in trained.items())


def test_the_adapter_is_float32_in_a_half_precision_denoiser(pipeline_folder):
    half = StableDiffusion.load(str(pipeline_folder), dtype=torch.bfloat16)
    add_lora(half.denoiser, 4, 4.0, TARGETS, seed=0)
    assert {p.dtype for p in trainable_parameters(half.denoiser).values()} == {torch.float32}
    assert half.denoiser.conv_in.weight.dtype == torch.bfloat16


def test_initialisation_is_a_function_of_the_seed_alone(pipeline_folder):
    adapters = []
    for seed in (0, 0, 1):
        torch.rand(3)
        model = StableDiffusion.load(str(pipeline_folder))
        add_lora(model.denoiser, 4, 4.0, TARGETS, seed)
        adapters.append(torch.cat([t.flatten() for t in get_lora(model.denoiser).tensors.values()]))
    assert torch.equal(adapters[0], adapters[1]) and not torch.equal(adapters[0], adapters[2])


def test_a_starts_with_the_distribution_that_is_named_and_b_with_zeros(model):
    for initialization in ("kaiming", "gaussian"):
        set_lora(model.denoiser, None)
        add_lora(model.denoiser, 2, 8.0, TARGETS, seed=0, initialization=initialization)
        lora = get_lora(model.denoiser)
        factors = [lora.tensors[f"{module}.lora_A.weight"] for module in lora.modules]
        if initialization == "kaiming":
            assert all(0.8 < a.abs().max() * a.shape[1] ** 0.5 <= 1 for a in factors)
        else:
            assert torch.cat([a.flatten() for a in factors]).std().item() == pytest.approx(1 / 2, rel=0.05)
        assert not any(lora.tensors[f"{module}.lora_B.weight"].any() for module in lora.modules)


def test_none_takes_the_adapter_away(model):
    base = predict(model)
    add_random(model)
    set_lora(model.denoiser, None)
    assert torch.equal(predict(model), base)


def test_adapters_of_different_rank_replace_each_other(model):
    add_random(model, rank=2)
    small = get_lora(model.denoiser)
    expected = predict(model)
    set_lora(model.denoiser, None)
    add_random(model, rank=5, seed=1)
    assert not torch.equal(predict(model), expected)
    set_lora(model.denoiser, small)
    assert torch.equal(predict(model), expected)


def test_unknown_target_layer_is_named(model):
    with pytest.raises(ConfigError, match=r"lora_target_modules.*to_nowhere"):
        add_lora(model.denoiser, 4, 4.0, ("to_q", "to_nowhere"), seed=0)


def test_an_adapter_of_another_model_is_not_loaded_silently(model):
    add_random(model)
    weights = get_lora(model.denoiser)
    set_lora(model.denoiser, None)
    renamed = {k.replace("down_blocks.0", "down_blocks.7"): v for k, v in weights.tensors.items()}
    with pytest.raises(ConfigError, match=r"LoRA: (\d+) of its (\d+) keys match .*, \d+ do not, .*down_blocks.7"):
        set_lora(model.denoiser, LoraWeights(renamed, 1.0))
    wider = {k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in weights.tensors.items()}
    with pytest.raises(ConfigError, match="in this model; the file"):
        set_lora(model.denoiser, LoraWeights(wider, 1.0))


def test_update_refuses_another_rank_and_names_both(model):
    add_random(model, rank=3)
    weights = get_lora(model.denoiser)
    set_lora(model.denoiser, None)
    add_lora(model.denoiser, 4, 4.0, TARGETS, seed=0)
    with pytest.raises(ConfigError, match=r"lora_rank = 3, this run has 4"):
        update_lora(model.denoiser, weights)


def test_update_keeps_the_adapter_trainable(model):
    add_random(model)
    weights = get_lora(model.denoiser)
    set_lora(model.denoiser, None)
    add_lora(model.denoiser, 3, 3.0, TARGETS, seed=0)
    update_lora(model.denoiser, weights)
    assert all(torch.equal(get_lora(model.denoiser).tensors[k], v) for k, v in weights.tensors.items())
    assert len(trainable_parameters(model.denoiser)) == len(weights.tensors)


def test_factors_of_two_ranks_are_refused(model):
    add_random(model)
    weights = get_lora(model.denoiser)
    set_lora(model.denoiser, None)
    cut = {k: v[:, :1] if "lora_B" in k else v for k, v in weights.tensors.items()}
    with pytest.raises(ConfigError, match="the file's factors are"):
        set_lora(model.denoiser, LoraWeights(cut, 1.0))


def test_a_block_is_no_layer_that_an_adapter_could_change(model):
    weights = LoraWeights({f"down_blocks.0.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}, 1.0)
    with pytest.raises(ConfigError, match="LoRA: 0 of its 2 keys match"):
        set_lora(model.denoiser, weights)
