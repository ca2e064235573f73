"""Stage ``vae``: trains the autoencoder (3 x 64 x 64 to 4 x 16 x 16 latents) and encodes the scenes.

Stage ``decoder`` trains the decoder further (``finish_decoder``).
"""

import math

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from scripts.tiny import scenes, world
from scripts.tiny.training import MovingAverage, TrainingLoop, bfloat16, optimizer_step, save_weights

CHANNELS = (24, 48, 48)
BATCH_SIZE = 16
LATENT_NOISE = 0.15  # the most noise that the decoder learns to ignore, as a share of the latents' own spread


def make():
    blocks = len(CHANNELS)
    # There are few norm groups: with one or two channels in a group, a flat region loses its level and training stalls.
    vae = AutoencoderKL(
        block_out_channels=CHANNELS, layers_per_block=1, latent_channels=4, norm_num_groups=3, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        scaling_factor=1.0,
    )  # fmt: skip
    return vae.to(memory_format=torch.channels_last)


def train(work, steps=3600, minutes=16.0, kl_weight=3e-4):
    """Trains to reconstruct crowded scenes (three quarters of a batch) and captioned ones. Keeps the moving average."""
    torch.manual_seed(31)
    images, _, _ = scenes.load(work, "train")
    crowds = scenes.load(work, "crowds")
    vae = make()
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0  # begin with little posterior noise
    average = MovingAverage(vae, 0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    modules = {"vae": vae, "average": average.module}
    loop = TrainingLoop("vae", work / "vae_state.pt", optimizer, modules, steps, minutes)
    plain = BATCH_SIZE // 4
    for step in loop:
        rows, more = torch.randint(len(images), (plain,)), torch.randint(len(crowds), (BATCH_SIZE - plain,))
        pixels = to_pixels(torch.cat([images[rows], crowds[more]]))
        with bfloat16():
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error, loss = reconstruction_loss(decoded, pixels)
        optimizer_step(loss + kl_weight * min(1, step / 500) * kl, optimizer)
        average.update(step)
        if step % 50 == 0:
            loop.show(l1=error, kl=kl)
    save_weights(average.module, work / "vae.safetensors")


def finish_decoder(work, steps=3000, minutes=45.0):
    """Trains the decoder further, with the encoder frozen, on latents as noisy as generated ones.

    The latents that the UNet learns do not change, so this may run at the same time as the UNet's training.
    """
    torch.manual_seed(32)
    images, contents, _ = scenes.load(work, "train")
    images = images[contents[:, 0] < 3]
    latents = load_file(work / "latents.safetensors")
    crowds = scenes.load(work, "crowds")
    vae = load(work)
    plain = 3 * BATCH_SIZE // 4

    def draw():
        rows, more = torch.randint(len(images), (plain,)), torch.randint(len(crowds), (BATCH_SIZE - plain,))
        pixels = to_pixels(torch.cat([images[rows], crowds[more]]))
        means = latents["moments"][rows].float().chunk(2, dim=1)[0]
        return torch.cat([means, encode_means(vae, pixels[plain:])]), pixels

    noise = LATENT_NOISE / latents["scale"]
    train_decoder(vae, work, "decoder", draw, noise, steps, minutes, learning_rate=1e-3, decay=0.995)
    save_weights(vae, work / "vae.safetensors")


def train_decoder(vae, work, name, draw, noise, steps, minutes, learning_rate, decay):
    """Trains the decoder of ``vae`` alone. Afterwards the decoder holds the moving average.

    Args:
        draw: Returns a batch of latents [B, 4, 16, 16], not scaled, and the pixels [B, 3, 64, 64] in [-1, 1] that they
            stand for.
        noise: The largest standard deviation of the Gaussian noise that each sample's latents get.
    """
    decoder = vae.decoder.requires_grad_(True).train()
    average = MovingAverage(decoder, decay)
    optimizer = torch.optim.AdamW(decoder.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    modules = {"decoder": decoder, "average": average.module}
    loop = TrainingLoop(name, work / f"{name}_state.pt", optimizer, modules, steps, minutes)
    for step in loop:
        clean, pixels = draw()
        amount = noise * torch.rand(len(clean), 1, 1, 1)
        with bfloat16():
            decoded = vae.decode(clean + amount * torch.randn_like(clean)).sample.float()
        error, loss = reconstruction_loss(decoded, pixels)
        optimizer_step(loss, optimizer)
        average.update(step)
        if step % 50 == 0:
            loop.show(l1=error)
    decoder.load_state_dict(average.module.state_dict())


@torch.no_grad()
def encode_means(vae, pixels):
    """Returns the posterior means of pixels [B, 3, 64, 64] in [-1, 1]: latents [B, 4, 16, 16], not scaled."""
    with bfloat16():
        return vae.encode(pixels).latent_dist.mean.float()


def reconstruction_loss(decoded, pixels):
    """Returns the mean absolute error and the loss.

    The loss is the sum of that error, the same error of differences between neighbours (outlines), and the mean squared
    error.
    """
    error = (decoded - pixels).abs().mean()
    edges = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (2, 3))
    return error, error + edges + (decoded - pixels).square().mean()


def to_pixels(images):
    """Turns uint8 pictures into the autoencoder's pixels, in [-1, 1]."""
    return (2 * world.to_float(images) - 1).to(memory_format=torch.channels_last)


def load(work, name="vae"):
    vae = make()
    vae.load_state_dict(load_file(work / f"{name}.safetensors"))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_scenes(work):
    """Writes posterior mean and log-variance of each scene that a prompt can ask for, and the scale to variance 1."""
    images, contents, _ = scenes.load(work, "train")
    askable = contents[:, 0] < 3
    images, contents = images[askable], contents[askable]
    vae, moments = load(work), []
    for part in tqdm(images.split(128), desc="latents"):
        with bfloat16():
            moments.append(vae.encode(to_pixels(part)).latent_dist.parameters.half())
    moments = torch.cat(moments).contiguous()
    mean, logvar = moments.float().chunk(2, dim=1)
    scale = 1 / (mean + (0.5 * logvar).exp() * torch.randn_like(mean)).std()
    save_file({"moments": moments, "contents": contents, "scale": scale}, work / "latents.safetensors")


@torch.no_grad()
def psnr(vae, images):
    """Returns the peak signal-to-noise ratio in dB of reconstructions of uint8 ``images``, and the reconstructions."""
    parts = [vae.decode(vae.encode(to_pixels(part)).latent_dist.mean).sample for part in images.split(64)]
    reconstructions = ((torch.cat(parts) + 1) / 2).clamp(0, 1)
    error = (reconstructions - world.to_float(images)).square().mean().item()
    return -10 * math.log10(error), reconstructions
