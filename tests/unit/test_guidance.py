"""f and its products against the formula, in one call or two, and what is called at all."""

import pytest
import torch

from alignprop.engine.seeding import generator, generators
from alignprop.lora.factors import add_lora, trainable_parameters
from alignprop.method.guidance import GuidedDenoiser
from alignprop.models.sd import StableDiffusion

SCALE, T = 4.0, torch.tensor(300)


@pytest.fixture
def model(pipeline_folder):
    model = StableDiffusion.load(str(pipeline_folder), dtype=torch.float64)
    add_lora(model.denoiser, 2, 2, ["to_q", "to_v"], seed=0)
    for name, parameter in trainable_parameters(model.denoiser).items():
        parameter.data = parameter.data.double().normal_(0, 0.5, generator=generator(name))
    return model


@pytest.fixture
def inputs(model):
    return model.init_latents(generators(range(3), "x")).double(), model.encode_prompts(["a cat", "a dog", "a bird"])


def formula(model, latents, cond, scale=SCALE, detach_unconditional=False):
    call = lambda embeds: model.denoiser(latents, T, embeds).sample  # noqa: E731
    unconditional, conditional = call(cond["negative_prompt_embeds"]), call(cond["prompt_embeds"])
    unconditional = unconditional.detach() if detach_unconditional else unconditional
    return unconditional + scale * (conditional - unconditional)


@pytest.mark.parametrize("batching", ["joint", "split"])
def test_the_value_is_the_extrapolation_from_unconditional_to_conditional(model, inputs, batching):
    latents, cond = inputs
    with torch.no_grad():
        torch.testing.assert_close(
            GuidedDenoiser(model, SCALE, batching=batching)(latents, T, cond), formula(model, latents, cond)
        )
        one = model.denoiser(latents, T, cond["prompt_embeds"]).sample
        assert torch.equal(GuidedDenoiser(model, 1.0, batching=batching)(latents, T, cond), one)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("grad", ["both", "cond"])
@pytest.mark.parametrize("batching", ["joint", "split"])
def test_products_are_those_of_autograd(model, inputs, batching, grad, kept):
    latents, cond = inputs
    parameters = list(trainable_parameters(model.denoiser).values())
    vector = torch.randn(latents.shape, generator=generator("v"), dtype=latents.dtype)
    leaf = latents.clone().requires_grad_()
    value = formula(model, leaf, cond, detach_unconditional=grad == "cond")
    expected = torch.autograd.grad(value, [*parameters, leaf], vector)

    f = GuidedDenoiser(model, SCALE, batching=batching, grad=grad)
    if kept:
        with torch.no_grad():
            output, graph = f.with_graph(latents, T, cond, needs_input=True)
        assert not output.requires_grad
        torch.testing.assert_close(output, value.detach())
        products = f.products_of(graph, vector, parameters)
    else:
        products = f.products_at(latents.clone().requires_grad_(), T, cond, vector, parameters)
    for ours, theirs in zip([*products.tensors, products.latents], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kept", [False, True])
def test_no_gradient_of_the_latents_where_none_is_asked_for(model, inputs, kept):
    latents, cond = inputs
    parameters, f = list(trainable_parameters(model.denoiser).values()), GuidedDenoiser(model, SCALE)
    ones = torch.ones_like(latents)
    if kept:
        products = f.products_of(f.with_graph(latents, T, cond, needs_input=False)[1], ones, parameters)
    else:
        products = f.products_at(latents, T, cond, ones, parameters)
    assert products.latents is None and all(product is not None for product in products.tensors)


@pytest.mark.parametrize(("batching", "grad", "sizes"), [
    ("joint", "both", [6]), ("split", "both", [3, 3]), ("joint", "cond", [3]), ("split", "cond", [3]),
])  # fmt: skip
def test_what_the_sweep_calls(model, inputs, batching, grad, sizes):
    latents, cond = inputs
    f, found, predict = GuidedDenoiser(model, SCALE, batching=batching, grad=grad), [], model.predict
    model.predict = lambda x, t, branch: found.append(len(x)) or predict(x, t, branch)
    f.products_at(latents, T, cond, torch.ones_like(latents), list(trainable_parameters(model.denoiser).values()))
    assert found == sizes


def test_the_second_call_of_split_guidance_is_made_when_the_first_is_gone(model, inputs):
    """Or it would save no memory: what the calls save for their backward passes is never held twice."""
    latents, cond = inputs
    counts = {}

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            counts["now"] += 1
            counts["most"] = max(counts.values())

        def __del__(self):
            counts["now"] -= 1

    def most_saved(batching):
        counts.update(now=0, most=0)
        f = GuidedDenoiser(model, SCALE, batching=batching)
        parameters = list(trainable_parameters(model.denoiser).values())
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            f.products_at(latents, T, cond, torch.ones_like(latents), parameters)
        return counts["most"]

    assert 0 < most_saved("split") <= most_saved("joint")
