"""Each input of a family's network is given, or a model that needs another one is refused."""

import inspect

import pytest
import torch
from diffusers import UNet2DConditionModel

from alignprop.models.unet import unknown_inputs
from tests.helpers.tiny_families import TINY, random_conditioning, run_pipeline, sample, tiny_model

# What no text-to-image pipeline of the family gives either, or gives as None: masks, ControlNets, adapters, attention.
NOT_GIVEN = {
    "sd": {
        "class_labels", "added_cond_kwargs", "attention_mask", "cross_attention_kwargs", "encoder_attention_mask",
        "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
        "return_dict",
    },
    "sd3": {"block_controlnet_hidden_states", "joint_attention_kwargs", "return_dict", "skip_layers"},
    "flux": {
        "joint_attention_kwargs", "controlnet_block_samples", "controlnet_single_block_samples", "return_dict",
        "controlnet_blocks_repeat",
    },
    "flux2": {"joint_attention_kwargs", "return_dict", "kv_cache", "kv_cache_mode", "num_ref_tokens"}
    | {"ref_fixed_timestep"},
    "z_image": {
        "return_dict", "controlnet_block_samples", "siglip_feats", "image_noise_mask", "patch_size", "f_patch_size",
        "joint_attention_kwargs",
    },
}  # fmt: skip
NOT_GIVEN["sdxl"] = NOT_GIVEN["sd"] - {"added_cond_kwargs"}


@pytest.mark.parametrize("family", TINY)
def test_an_input_that_nobody_knows_of_is_noticed(family, monkeypatch):
    """A new version of diffusers may add one: then it is to be given, or refused, or listed above."""
    model, given = tiny_model(TINY[family]), []
    signature, forward = inspect.signature(type(model.denoiser).forward), type(model.denoiser).forward

    def note(self, *args, **kwargs):
        given.extend(signature.bind(self, *args, **kwargs).arguments)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.denoiser), "forward", note)
    latents = model.init_latents([torch.Generator()])
    model.predict(latents, torch.tensor(0.5), model.branches(model.blank_conditioning(1), 2.0)[-1])
    assert set(signature.parameters) - set(given) == NOT_GIVEN[family]


UNET_FIELDS = {  # of an input; those of shapes and layers change nothing that predict gives
    "in_channels", "out_channels", "addition_embed_type", "class_embed_type", "num_class_embeds",
    "encoder_hid_dim_type", "time_cond_proj_dim",
}  # fmt: skip
LAYERS = {
    "sample_size", "center_input_sample", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type",
    "up_block_types", "only_cross_attention", "block_out_channels", "layers_per_block", "downsample_padding",
    "mid_block_scale_factor", "dropout", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim",
    "transformer_layers_per_block", "reverse_transformer_layers_per_block", "encoder_hid_dim", "attention_head_dim",
    "num_attention_heads", "dual_cross_attention", "use_linear_projection", "addition_time_embed_dim",
    "upcast_attention", "resnet_time_scale_shift", "resnet_skip_time_act", "resnet_out_scale_factor",
    "time_embedding_type", "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "conv_in_kernel",
    "conv_out_kernel", "projection_class_embeddings_input_dim", "attention_type", "class_embeddings_concat",
    "mid_block_only_cross_attention", "cross_attention_norm", "addition_embed_type_num_heads",
}  # fmt: skip


def test_every_field_of_a_unet_is_one_of_an_input_or_of_layers():
    fields = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    assert fields == UNET_FIELDS | LAYERS


@pytest.mark.parametrize(("family", "fields", "reason"), [
    ("sd", {"in_channels": 9}, r"takes 9 channels and returns 4, and its VAE has 4"),
    ("sd", {"out_channels": 8}, r"takes 4 channels and returns 8"),
    ("sd", {"addition_embed_type": "text"}, r"has the added conditions 'text', not None"),
    ("sdxl", {"addition_embed_type": None}, r"has the added conditions None, not 'text_time'"),
    ("sdxl", {"addition_embed_type": "text_image"}, r"has the added conditions 'text_image', not 'text_time'"),
    ("sd", {"class_embed_type": "timestep"}, r"has class_embed_type = 'timestep'"),
    ("sdxl", {"num_class_embeds": 10}, r"has num_class_embeds = 10"),
    ("sd", {"encoder_hid_dim_type": "text_image_proj"}, r"has encoder_hid_dim_type = 'text_image_proj'"),
])  # fmt: skip
def test_a_unet_with_another_input_is_refused(family, fields, reason):
    model = tiny_model(TINY[family])
    config = type(model.denoiser.config)({**model.denoiser.config, **fields})
    assert unknown_inputs(config, 4, type(model).added).startswith(reason)
    assert unknown_inputs(model.denoiser.config, 4, type(model).added) == ""


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_distilled_guidance_is_the_pipelines(family):
    """A UNet with `time_cond_proj_dim` is told the guidance scale, and has one branch."""
    facts = {**TINY[family], "denoiser": {**TINY[family]["denoiser"], "time_cond_proj_dim": 8}}
    model = tiny_model(facts)
    torch.nn.init.normal_(model.denoiser.time_embedding.cond_proj.weight)
    between, behind = ([None] * 4, []) if family == "sdxl" else ([None] * 2, [None, None, None, False])
    pipeline = model.pipeline_class()(model.decoder, *between, model.denoiser, model.scheduler, *behind)
    cond = random_conditioning(model, 2)
    assert not any(name.startswith("negative") for name in cond)
    latents, pictures = model.init_latents([torch.Generator().manual_seed(seed) for seed in (1, 2)]), []
    for guidance_scale in (1.0, 5.0):
        expected = run_pipeline(pipeline, latents=latents, guidance_scale=guidance_scale, **cond)
        assert len(model.branches(cond, guidance_scale)) == 1
        final = sample(model, latents, cond, guidance_scale, pipeline.scheduler.timesteps)
        with torch.no_grad():
            pictures.append(model.decode(final))
        torch.testing.assert_close(pictures[-1], expected, rtol=0, atol=2e-5)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
