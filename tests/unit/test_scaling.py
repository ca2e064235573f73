import pytest
import torch

from alignprop.engine.seeding import generator
from alignprop.lora.factors import LoraWeights, get_lora, set_lora, trainable_parameters
from alignprop.lora.scaling import linear_schedule, scale_lora, without_lora
from alignprop.memory.lean import make_lean
from alignprop.method.guidance import GuidedDenoiser
from alignprop.models.sd import StableDiffusion
from tests.unit.test_factors import add_random, predict


@pytest.fixture
def model(pipeline_folder):
    return StableDiffusion.load(str(pipeline_folder))


@pytest.mark.parametrize("lean", [False, True])
def test_a_scaled_adapter_reaches_the_base_and_itself_to_the_bit(model, lean):
    base = predict(model)
    add_random(model, alpha=5.0)
    if lean:
        make_lean(model.denoiser)
    own, weights = predict(model), get_lora(model.denoiser)
    scale_lora(model.denoiser, 0.0)
    assert torch.equal(predict(model), base)
    scale_lora(model.denoiser, 1.0)
    assert torch.equal(predict(model), own)
    scale_lora(model.denoiser, 0.3)
    part = predict(model)
    set_lora(model.denoiser, LoraWeights(weights.tensors, 0.3 * weights.scale))
    torch.testing.assert_close(part, predict(model), rtol=1e-5, atol=1e-5)
    assert (part - own).abs().max() > 0.01


def test_without_its_adapter_a_denoiser_is_the_base_for_a_while(model):
    base = predict(model)
    add_random(model)
    scale_lora(model.denoiser, 0.5)
    half, trained = predict(model), list(trainable_parameters(model.denoiser))
    with pytest.raises(KeyError), without_lora(model.denoiser):
        assert torch.equal(predict(model), base) and list(trainable_parameters(model.denoiser)) == trained
        raise KeyError
    assert torch.equal(predict(model), half)


@torch.no_grad()
def test_an_annealed_adapter_grows_from_the_base_to_its_scale(model):
    latents, cond, times = model.init_latents([generator("x")]), model.encode_prompts(["a cat"]), [900, 600, 300]
    expected = [GuidedDenoiser(model, 5.0)(latents, torch.tensor(900), cond)]
    add_random(model)
    for t, scale in ((600, 0.4), (300, 0.8)):
        scale_lora(model.denoiser, scale)
        expected.append(GuidedDenoiser(model, 5.0)(latents, torch.tensor(t), cond))
    f = GuidedDenoiser(model, 5.0, lora_scale_at=linear_schedule(torch.tensor(times), 0.8))
    for t, output in [*zip(times, expected, strict=True), (900, expected[0])]:  # the next chain starts over
        assert torch.equal(f(latents, torch.tensor(t), cond), output)
    f = GuidedDenoiser(model, 5.0, lora_scale_at=linear_schedule(torch.tensor([300.0]), 0.8))
    assert torch.equal(f(latents, torch.tensor(300.0), cond), expected[2])
