import torch

from tests.helpers.tiny_families import TINY, check_family, random_conditioning, run_pipeline, sample, tiny_model


def test_it_keeps_the_protocol():
    model = tiny_model(TINY["sdxl"])
    check_family(model, latent_shape=(4, 8, 8))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.blank_conditioning(3).items()}
    embeds, pooled = (3, 77, 16 + 24), (3, 12)
    assert shapes == {
        "prompt_embeds": embeds, "negative_prompt_embeds": embeds, "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": pooled,
    }  # fmt: skip


def test_pictures_are_the_diffusers_pipelines():
    model = tiny_model(TINY["sdxl"])
    pipeline = model.pipeline_class()(model.decoder, None, None, None, None, model.denoiser, model.scheduler)
    cond = random_conditioning(model, 2)
    latents = model.init_latents([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    for guidance_scale in (1.0, 5.0):
        expected = run_pipeline(pipeline, latents=latents, guidance_scale=guidance_scale, **cond)
        for joined in (False, True):
            final = sample(model, latents, cond, guidance_scale, pipeline.scheduler.timesteps, joined)
            with torch.no_grad():
                torch.testing.assert_close(model.decode(final), expected, rtol=0, atol=2e-5)


def test_without_guidance_there_is_one_branch():
    model = tiny_model(TINY["sdxl"])
    cond = random_conditioning(model, 2)
    (conditional,) = model.branches(cond, 1.0)
    unconditional, same = model.branches(cond, 5.0)
    assert conditional.keys() == unconditional.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    assert all(conditional[name] is same[name] is cond[name] for name in conditional)
    assert unconditional["pooled_prompt_embeds"] is cond["negative_pooled_prompt_embeds"]
