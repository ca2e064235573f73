"""Models built from facts: the full-size ones on the meta device, tiny ones with random weights."""

import pytest
import torch

from alignprop.memory.accounting import Account
from alignprop.models.configs import bundled_config, folder_config
from alignprop.models.sd import StableDiffusion
from alignprop.models.skeleton import build_module, random_model, skeleton
from alignprop.settings.errors import ConfigError
from tests.helpers.tiny_families import SIDE, TINY

FULL_SIZE = {  # latents, side of the picture, TFLOP of one sample's network call
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ((4, 64, 64), 512, 0.803),
    "stabilityai/stable-diffusion-2-1": ((4, 96, 96), 768, 2.149),
    "stabilityai/stable-diffusion-xl-base-1.0": ((4, 128, 128), 1024, 6.761),
    "stabilityai/stable-diffusion-3.5-medium": ((16, 128, 128), 1024, 11.250),
    "black-forest-labs/FLUX.1-dev": ((16, 128, 128), 1024, 74.385),
}


def modules(model):
    return [model.denoiser, model.decoder, *model.text_encoders]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_model_runs_without_memory(name):
    latent_shape, side, tflop = FULL_SIZE[name]
    model = skeleton(bundled_config(name), torch.bfloat16)
    tensors = [t for module in modules(model) for t in [*module.parameters(), *module.buffers()]]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}
    cond = model.blank_conditioning(1)
    latents = model.init_latents([torch.Generator()])
    assert latents.shape == (1, *latent_shape)
    (branch,) = model.branches(cond, 1.0)
    with torch.no_grad(), Account("meta") as account:
        output = model.predict(latents, torch.zeros((), device="meta"), branch)
    assert output.shape == latents.shape
    images = model.decode(latents)
    assert images.shape == (1, 3, side, side) and images.dtype == torch.float32
    assert account.flops[""] / 1e12 == pytest.approx(tflop, abs=5e-4)


def test_text_encoders_run_on_meta_at_full_size():
    model = skeleton(bundled_config("stabilityai/stable-diffusion-3.5-medium"), torch.bfloat16)
    cond = model.blank_conditioning(2)
    with torch.no_grad():
        *clips, t5 = (encoder(torch.zeros(2, 77, dtype=torch.long, device="meta")) for encoder in model.text_encoders)
    pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
    assert pooled.shape == cond["pooled_prompt_embeds"].shape and pooled.dtype == torch.bfloat16
    assert t5.last_hidden_state.shape[-1] == cond["prompt_embeds"].shape[-1]


def test_a_skeleton_of_a_folder_is_the_model_that_it_loads_as(pipeline_folder):
    loaded = StableDiffusion.load(str(pipeline_folder), dtype=torch.bfloat16)
    model = skeleton(folder_config(pipeline_folder), torch.bfloat16)
    describe = lambda m: {k: (v.shape, v.dtype) for k, v in m.state_dict().items()}  # noqa: E731
    for one, other in zip(modules(model), modules(loaded), strict=True):
        assert describe(one) == describe(other)
    assert type(model.scheduler) is type(loaded.scheduler)
    options = [{k: v for k, v in m.scheduler.config.items() if not k.startswith("_")} for m in (model, loaded)]
    assert options[0] == options[1]
    blank, encoded = model.blank_conditioning(2), loaded.encode_prompts(["a cat", "a dog"])
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in encoded.items()}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_give_finite_gradients_in_any_precision(family, dtype):
    model = random_model(TINY[family], dtype, "cpu", resolution=SIDE.get(family))
    assert {p.dtype for module in modules(model) for p in module.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    latents = model.init_latents([torch.Generator().manual_seed(0)]).requires_grad_()
    output = model.predict(latents, torch.tensor(500.0), model.branches(model.blank_conditioning(1), 1.0)[0])
    assert output.dtype == dtype and output.std() > 0
    (gradient,) = torch.autograd.grad(model.decode(output).sum(), latents)
    assert gradient.isfinite().all() and gradient.any()


def test_half_precision_weights_never_exist_in_float32():
    with Account("cpu") as account:
        denoiser = build_module(TINY["flux"]["denoiser"], torch.bfloat16, "cpu")
    assert account.peak <= 1.2 * account.bytes and account.bytes >= 2 * sum(p.numel() for p in denoiser.parameters())


def test_the_default_precision_comes_back_after_a_failure():
    with pytest.raises(ConfigError):
        build_module({"_class_name": "AutoencoderKL", "down_block_types": ["Unheard"]}, torch.bfloat16, "meta")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"_class_name": "AutoencoderTinier"}, "transformers has no PreTrainedModel of the name 'AutoencoderTinier'"),
        ({"_class_name": "StableDiffusionPipeline"}, "diffusers has no ModelMixin of the name"),
        ({"_class_name": "pipeline"}, "transformers has no PreTrainedModel of the name 'pipeline'"),
        (
            {"_class_name": "UNet2DConditionModel", "block_out_channels": [32]},
            "no UNet2DConditionModel can be built from its configuration: ValueError: Must provide the same number",
        ),
        ({"_class_name": "CLIPTextModel", "hidden_act": "none"}, "no CLIPTextModel can be built .*KeyError"),
    ],
)
def test_facts_that_fit_no_class_are_one_line(facts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_module(facts, torch.float32, "meta")
    assert "\n" not in str(caught.value)
