import torch

from tests.helpers.tiny_families import TINY, check_family, random_conditioning, run_pipeline, sample, tiny_model


def test_it_keeps_the_protocol():
    model = tiny_model(TINY["sd3"])
    check_family(model, latent_shape=(4, 8, 8))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.blank_conditioning(3).items()}
    embeds, pooled = (3, 77 + 256, 32), (3, 8 + 12)
    assert shapes == {
        "prompt_embeds": embeds, "negative_prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled,
    }  # fmt: skip


def test_pictures_are_the_diffusers_pipelines():
    model = tiny_model(TINY["sd3"])
    parts = model.denoiser, model.scheduler, model.decoder, *[None] * 6
    pipeline = model.pipeline_class()(*parts)
    cond = random_conditioning(model, 2)
    latents = model.init_latents([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    for guidance_scale in (1.0, 5.0):
        expected = run_pipeline(pipeline, latents=latents, guidance_scale=guidance_scale, height=16, width=16, **cond)
        for joined in (False, True):
            model.scheduler.set_timesteps(2)
            final = sample(model, latents, cond, guidance_scale, model.scheduler.timesteps, joined)
            with torch.no_grad():
                torch.testing.assert_close(model.decode(final), expected, rtol=0, atol=2e-5)
