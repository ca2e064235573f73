"""Stage ``unet``: trains the conditional denoiser (v-prediction on the scenes' latents), and builds the pipeline."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file

from scripts.tiny import clip as clip_stage
from scripts.tiny import vae as vae_stage
from scripts.tiny.training import MovingAverage, TrainingLoop, bfloat16, optimizer_step, save_weights

CHANNELS = (64, 96, 112)
CAPTION_DROPOUT = 0.1
BATCH_SIZE = 64
GUIDANCE, EFFECTIVE_GUIDANCE = 3.0, 1.3
GUIDANCE_AWARE_FROM = 0.6  # share of the schedule; before it, the prediction without a caption is too poor


def make():
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=clip_stage.WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    unet.set_attn_processor(AttnProcessor())  # on a CPU the backward of torch's fused attention is far slower
    return unet


def make_scheduler():
    """Returns a schedule with zero terminal signal, where sampling begins.

    A background covers the picture, and its mean leaks through the last step of the ordinary schedule. A sampler that
    starts from pure noise does not have this signal.
    """
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def train(work, out, steps=8000, minutes=65.0, learning_rate=1e-3):
    """Trains on latents and the CLIP's frozen text states. Keeps the moving average.

    Guidance 3 exaggerates. While a shape is still undecided, guidance subtracts the average of all shapes, and circles
    become diamonds, squares become pincushions. So the last part of the training accounts for guidance (``v_loss``).
    """
    torch.manual_seed(41)
    _fit(make(), work, out, "unet", steps, minutes, learning_rate, 0.998, GUIDANCE_AWARE_FROM)


def train_longer(work, out, steps=20000, minutes=55.0, learning_rate=6e-4):
    """Continues from the weights of stage ``unet``, and accounts for guidance throughout. Outlines become smoother."""
    torch.manual_seed(42)
    _fit(load(work), work, out, "unet_longer", steps, minutes, learning_rate, 0.9985, aware_from=0.0)


def _fit(unet, work, out, name, steps, minutes, learning_rate, decay, aware_from):
    latents = load_file(work / "latents.safetensors")
    moments, index = latents["moments"], clip_stage.content_index(latents["contents"])
    states = clip_stage.all_text_states(out)
    empty = len(states) - 1
    alphas = make_scheduler().alphas_cumprod
    average = MovingAverage(unet, decay)
    optimizer = torch.optim.AdamW(unet.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    modules = {"unet": unet, "average": average.module}
    loop = TrainingLoop(name, work / f"{name}_state.pt", optimizer, modules, steps, minutes)
    running = None
    for step in loop:
        rows = torch.randint(len(moments), (BATCH_SIZE,))
        mean, logvar = moments[rows].float().chunk(2, dim=1)
        clean = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * latents["scale"]
        captions = index[rows].masked_fill(torch.rand(BATCH_SIZE) < CAPTION_DROPOUT, empty)
        strength = torch.ones(BATCH_SIZE)
        if loop.progress >= aware_from:
            strength[captions != empty] = EFFECTIVE_GUIDANCE / GUIDANCE
        loss = v_loss(unet, clean, states[captions], alphas, strength, states[empty])
        optimizer_step(loss, optimizer)
        average.update(step)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        loop.show(loss=running)
    save_weights(average.module, work / f"{name}.safetensors")


def v_loss(unet, clean, states, alphas, strength, empty_state):
    """Returns the mean squared error of the velocity (Salimans & Ho 2022, arXiv 2202.00512) at stratified timesteps.

    If ``strength`` s [B] is below 1, the target of a captioned prediction c is u + s (v - u), and u is the prediction
    without a caption. Guidance g then samples u + g (c - u) = u + g s (v - u), which is an effective guidance of g s.
    """
    batch = len(clean)
    timesteps = ((torch.arange(batch) + torch.rand(1)) * len(alphas) / batch).long().clamp(max=len(alphas) - 1)
    noise = torch.randn_like(clean)
    signal, sigma = (a.sqrt()[:, None, None, None] for a in (alphas[timesteps], 1 - alphas[timesteps]))
    noisy, target = signal * clean + sigma * noise, signal * noise - sigma * clean
    strength = strength[:, None, None, None]
    with bfloat16():
        if (strength < 1).any():
            with torch.no_grad():
                plain = unet(noisy, timesteps, empty_state.expand(batch, -1, -1)).sample.float()
            target = plain + strength * (target - plain)
        predicted = unet(noisy, timesteps, states).sample.float()
    return ((predicted - target) / strength).square().mean()


def load(work, name="unet"):
    unet = make()
    unet.load_state_dict(load_file(work / f"{name}.safetensors"))
    return unet


def save_pipeline(work, out, unet):
    """Writes ``out/pipeline``, a diffusers ``StableDiffusionPipeline`` folder in float16."""
    from transformers import CLIPTextModel

    clip, tokenizer = clip_stage.load(out)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    vae = vae_stage.load(work, "vae_longer")
    vae.register_to_config(scaling_factor=load_file(work / "latents.safetensors")["scale"].item())
    fresh = make()
    fresh.load_state_dict(unet.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=fresh, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(out / "pipeline")
    clip_stage.use_in_float32(out / "pipeline" / "text_encoder")
