"""Stage ``aesthetic``: the LAION head's architecture, fitted to the world's rating of style."""

import torch
from safetensors.torch import load_file
from torch import nn

from scripts.tiny import clip as clip_stage
from scripts.tiny import scenes, world
from scripts.tiny.training import TrainingLoop, optimizer_step, save_weights

BATCH_SIZE = 256


class AestheticHead(nn.Module):
    """Maps normalised CLIP image embeddings [N, width] to ratings [N], by linear layers with only dropout between.

    The layers and their names are those of the LAION aesthetic predictor (christophschuhmann's
    improved-aesthetic-predictor), so that one loader reads both.
    """

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embeds):
        return self.layers(embeds)[:, 0]


def train(work, out, steps=1500):
    """Fits in standard units, then folds the input's scale and the rating's mean and spread into the weights."""
    torch.manual_seed(51)
    clip, _ = clip_stage.load(out)
    images, _, styles = scenes.load(work, "train")
    images, styles = images[:16000], styles[:16000]
    embeds, ratings = clip_stage.embed_images(clip, images), world.rating(styles)
    width, mean, spread = embeds.shape[1], ratings.mean(), ratings.std()
    head = AestheticHead(width)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.01)
    loop = TrainingLoop("aesthetic", work / "aesthetic_state.pt", optimizer, {"head": head}, steps)
    for _ in loop:
        rows = torch.randint(len(embeds), (BATCH_SIZE,))
        loss = (head(embeds[rows] * width**0.5) - (ratings[rows] - mean) / spread).square().mean()
        optimizer_step(loss, optimizer)
        loop.show(loss=loss)
    with torch.no_grad():
        head.layers[0].weight *= width**0.5
        head.layers[7].weight *= spread
        head.layers[7].bias.copy_(head.layers[7].bias * spread + mean)
    out.mkdir(exist_ok=True, parents=True)
    save_weights(head, out / "aesthetic.safetensors", torch.float16)


@torch.no_grad()
def r_squared(work, out):
    """Returns the share of the rating's variance on drawn test scenes that the saved head explains."""
    clip, _ = clip_stage.load(out)
    images, _, styles = scenes.load(work, "test")
    head = AestheticHead(clip_stage.WIDTH)
    head.load_state_dict(load_file(out / "aesthetic.safetensors"))
    ratings = world.rating(styles)
    error = head.float().eval()(clip_stage.embed_images(clip, images)) - ratings
    return 1 - (error.square().mean() / ratings.var()).item()
