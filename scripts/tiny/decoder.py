"""Stage ``decoder_longer``: trains the decoder again, on latents as the denoiser makes them, not as the encoder does.

The outlines that the denoiser makes waver. A drawn scene is noised part of the way and sampled back, and the decoder
learns to draw the original scene from these latents. Encoder and denoiser do not change.
"""

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from scripts.tiny import clip as clip_stage
from scripts.tiny import scenes, unet, vae
from scripts.tiny.training import bfloat16, save_weights

STEPS = 20  # of the whole chain
FIRST_STEPS = range(7, 15)  # the steps at which a scene enters the chain: its content stays, its outlines are remade
NOISE = 0.1  # the most noise, as a share of the latents' own spread
REMADE, DRAWN, CROWDS = 10, 3, 3  # the scenes of each kind in a batch


@torch.no_grad()
def make_latents(work, out, singles=2600, others=2400, batch_size=50):
    """Writes to ``work`` the latents of scenes remade by the denoiser of stage ``unet``, and the scenes' rows."""
    torch.manual_seed(33)
    latents = load_file(work / "latents.safetensors")
    index, states = clip_stage.content_index(latents["contents"]), clip_stage.all_text_states(out)
    denoiser = unet.load(work)
    single = latents["contents"][:, 0] == 0
    rows = torch.cat([_some(single, singles), _some(~single, others)])
    rows, remade = rows[torch.randperm(len(rows))], []
    for k, part in enumerate(tqdm(rows.split(batch_size), "latents as the denoiser makes them")):
        clean = latents["moments"][part].float().chunk(2, dim=1)[0] * latents["scale"]
        first = FIRST_STEPS[k % len(FIRST_STEPS)]
        remade.append(_remake(denoiser, clean, first, states[index[part]], states[-1]).half())
    save_file({"latents": torch.cat(remade), "rows": rows}, work / "remade.safetensors")


def _some(chosen, number):
    places = chosen.nonzero()[:, 0]
    return places[torch.randperm(len(places))][:number]


def _remake(denoiser, clean, first, states, empty):
    """Noises scaled latents [B, 4, 16, 16] to step ``first`` of the chain, and samples them back with guidance."""
    scheduler = unet.make_scheduler()
    scheduler.set_timesteps(STEPS)
    steps = scheduler.timesteps[first:]
    x = scheduler.add_noise(clean, torch.randn_like(clean), steps[:1].expand(len(clean)))
    both = torch.cat([empty.expand(len(clean), -1, -1), states])
    for t in steps:
        with bfloat16():
            plain, captioned = denoiser(torch.cat([x, x]), t, both).sample.float().chunk(2)
        x = scheduler.step(plain + unet.GUIDANCE * (captioned - plain), t, x, return_dict=False)[0]
    return x


def train(work, steps=7000, minutes=25.0):
    """Trains the decoder on remade, drawn and crowded scenes. Writes ``vae_longer.safetensors``."""
    torch.manual_seed(34)
    latents, remade = load_file(work / "latents.safetensors"), load_file(work / "remade.safetensors")
    images, contents, _ = scenes.load(work, "train")
    images, crowds, scale = images[contents[:, 0] < 3], scenes.load(work, "crowds"), latents["scale"]
    autoencoder = vae.load(work)

    def draw():
        pick = torch.randint(len(remade["rows"]), (REMADE,))
        drawn, crowded = torch.randint(len(images), (DRAWN,)), torch.randint(len(crowds), (CROWDS,))
        pixels = vae.to_pixels(torch.cat([images[remade["rows"][pick]], images[drawn], crowds[crowded]]))
        means = latents["moments"][drawn].float().chunk(2, dim=1)[0]
        encoded = vae.encode_means(autoencoder, pixels[-CROWDS:])
        return torch.cat([remade["latents"][pick].float() / scale, means, encoded]), pixels

    noise = NOISE / scale
    vae.train_decoder(autoencoder, work, "decoder_longer", draw, noise, steps, minutes, learning_rate=8e-4, decay=0.998)
    save_weights(autoencoder, work / "vae_longer.safetensors")
