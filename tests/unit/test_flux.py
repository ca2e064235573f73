import pytest
import torch
from diffusers import FluxPipeline

from alignprop.models.flux import image_ids, pack, unpack
from tests.helpers.tiny_families import TINY, check_family, random_conditioning, run_pipeline, sample, tiny_model


def facts(guidance_embeds):
    denoiser = {**TINY["flux"]["denoiser"], "guidance_embeds": guidance_embeds}
    return {**TINY["flux"], "denoiser": denoiser}


def test_it_keeps_the_protocol():
    model = tiny_model(TINY["flux"])
    check_family(model, latent_shape=(4, 8, 8))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.blank_conditioning(3).items()}
    assert shapes == {"prompt_embeds": (3, 512, 32), "pooled_prompt_embeds": (3, 16)}


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
def test_pictures_are_the_diffusers_pipelines(guidance_embeds):
    model = tiny_model(facts(guidance_embeds))
    pipeline = model.pipeline_class()(model.scheduler, model.decoder, None, None, None, None, model.denoiser)
    cond = random_conditioning(model, 2)
    latents = model.init_latents([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    options = {"guidance_scale": 3.5, "height": 16, "width": 16}
    expected = run_pipeline(pipeline, latents=pack(latents), **options, **cond)
    model.scheduler.set_timesteps(**model.schedule(2))
    final = sample(model, latents, cond, 3.5, model.scheduler.timesteps)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(final), expected, rtol=0, atol=2e-5)


def test_guidance_is_an_input_and_no_second_branch():
    model = tiny_model(facts(True))
    cond = random_conditioning(model, 2)
    (branch,) = model.branches(cond, 3.5)
    assert branch["guidance"].tolist() == [3.5, 3.5] and "guidance" not in cond
    assert tiny_model(facts(False)).branches(cond, 3.5) == [cond]
    latents, t = torch.ones(2, 4, 8, 8), torch.tensor(500.0)
    with torch.no_grad():
        weak, strong = (model.predict(latents, t, model.branches(cond, scale)[0]) for scale in (1.0, 9.0))
    assert not torch.equal(weak, strong)


def test_packing_is_the_pipelines_and_unpacking_its_inverse():
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 6, 8), latents)
    expected = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float64)
    assert torch.equal(image_ids(3, 4, torch.zeros(1, dtype=torch.float64)), expected)
