"""Facts of tiny models of the larger families, and the sampling loop that their pipelines run."""

import torch

from alignprop.models.skeleton import random_model

TEXT = {
    "vocab_size": 550, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 77, "bos_token_id": 548, "eos_token_id": 549, "pad_token_id": 549,
}  # fmt: skip
FIRST_CLIP = {"_class_name": "CLIPTextModel", "hidden_size": 16, "projection_dim": 8, **TEXT}
SECOND_CLIP = {"_class_name": "CLIPTextModelWithProjection", "hidden_size": 24, "projection_dim": 12, **TEXT}
T5 = {"_class_name": "T5EncoderModel", "vocab_size": 99, "d_model": 32, "d_ff": 16, "num_layers": 1, "num_heads": 2}
QWEN = {
    "_class_name": "Qwen3Model", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}
FLOW_VAE = {**VAE, "shift_factor": 0.25, "use_quant_conv": False, "use_post_quant_conv": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
DYNAMIC_FLOW = {**FLOW, "shift": 1.0, "use_dynamic_shifting": True}
TINY = {
    "sd": {
        "family": "sd",
        "denoiser": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 8,
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
        },
        "vae": VAE,
        "text_encoders": [FIRST_CLIP],
        "scheduler": DDIM,
    },
    "sdxl": {
        "family": "sdxl",
        "denoiser": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 8,
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "attention_head_dim": [2, 4],
            "cross_attention_dim": 16 + 24,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 12 + 6 * 8,
            "norm_num_groups": 8,
        },
        "vae": VAE,
        "text_encoders": [FIRST_CLIP, SECOND_CLIP],
        "scheduler": DDIM,
    },
    "sd3": {
        "family": "sd3",
        "denoiser": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8 + 12,
            "pos_embed_max_size": 8,
            "dual_attention_layers": [0],
            "qk_norm": "rms_norm",
        },
        "vae": FLOW_VAE,
        "text_encoders": [{**FIRST_CLIP, "_class_name": "CLIPTextModelWithProjection"}, SECOND_CLIP, T5],
        "scheduler": FLOW,
    },
    "flux": {
        "family": "flux",
        "denoiser": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": [4, 6, 6],
        },
        "vae": FLOW_VAE,
        "text_encoders": [FIRST_CLIP, T5],
        "scheduler": DYNAMIC_FLOW,
    },
    "flux2": {
        "family": "flux2",
        "denoiser": {
            "_class_name": "Flux2Transformer2DModel",
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 3 * 8,
            "axes_dims_rope": [4, 4, 4, 4],
            "guidance_embeds": False,
        },
        "vae": {k: v for k, v in VAE.items() if k != "scaling_factor"}
        | {"_class_name": "AutoencoderKLFlux2", "latent_channels": 4},
        "text_encoders": [{**QWEN, "_class_name": "Qwen3ForCausalLM", "hidden_size": 8, "num_hidden_layers": 28}],
        "scheduler": DYNAMIC_FLOW,
    },
    "z_image": {
        "family": "z_image",
        "denoiser": {
            "_class_name": "ZImageTransformer2DModel",
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 6, 6],
            "axes_lens": [600, 64, 64],
        },
        "vae": FLOW_VAE,
        "text_encoders": [QWEN],
        "scheduler": FLOW,
    },
}
SIDE = {"flux2": 16, "z_image": 16}  # of the pictures, where the model's own is 1024 whatever its parts


def tiny_model(facts, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return random_model(facts, torch.float32, "cpu", resolution=SIDE.get(facts["family"]))


def random_conditioning(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) for k, v in model.blank_conditioning(count).items()}


@torch.no_grad()
def sample(model, latents, cond, guidance_scale, timesteps, joined=False):
    """x[N] by `scheduler.step`, with the branches called one by one or joined along the batch."""
    branches = model.branches(cond, guidance_scale)
    for t in timesteps:
        if joined:
            both = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
            outputs = model.predict(torch.cat([latents] * len(branches)), t, both).chunk(len(branches))
        else:
            outputs = [model.predict(latents, t, branch) for branch in branches]
        output = outputs[0] if len(outputs) == 1 else outputs[0] + guidance_scale * (outputs[1] - outputs[0])
        latents = model.scheduler.step(output, t, latents).prev_sample
    return latents


def run_pipeline(pipeline, **inputs):
    """Images [B, 3, H, W] in [0, 1] of a diffusers pipeline in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(num_inference_steps=2, output_type="pt", **inputs).images


def check_family(model, latent_shape):
    """What holds of every family that is built from modules."""
    modules = [model.denoiser, model.decoder, *model.text_encoders]
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for module in modules for m in module.modules())
    assert model.decoder.encoder is None and model.decoder.quant_conv is None
    generators = lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    latents = model.init_latents(generators([1, 2]))
    assert latents.shape == (2, *latent_shape) and latents.dtype == torch.float32
    assert torch.equal(model.init_latents(generators([2]))[0], latents[1]), "a sample's noise is its generator's"
    blank = model.blank_conditioning(3)
    assert all(len(t) == 3 and not t.any() and t.dtype == torch.float32 for t in blank.values())
    images = model.decode(100 * latents)
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
