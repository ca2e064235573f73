"""Stage ``decoder_longer``: the decoder once more, on latents as the denoiser makes them, not as the encoder does.

The denoiser's outlines waver. A drawn scene is noised part of the way and sampled back; the decoder then learns to draw
the scene itself from these latents. Encoder and denoiser stay as they are.
"""

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from scripts.tiny import clip as clip_stage
from scripts.tiny import scenes, unet, vae
from scripts.tiny.training import bfloat16, save_weights

STEPS = 20  # of the whole chain
FIRST_STEPS = range(7, 15)  # where in the chain a scene enters it: its content stays, its outlines are made anew
NOISE = 0.1  # of the latents' own spread, at most
REMADE, DRAWN, CROWDS = 10, 3, 3  # of a batch


@torch.no_grad()
def make_latents(work, out, singles=2600, others=2400, batch_size=50):
    """Latents of scenes that the denoiser of stage ``unet`` has remade, and the scenes' row numbers, into ``work``."""
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
    """Scaled latents [B, 4, 16, 16], noised to step ``first`` of the chain and sampled back with guidance."""
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
    """Train the decoder on remade, drawn and crowded scenes; write ``vae_longer.safetensors``."""
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
