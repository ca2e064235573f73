"""Stage ``judge``: trains the independent classifier of content and style on drawn scenes."""

import json

import torch
from torch.nn.functional import cross_entropy

from rewards.tiny_judge import CONTENT, JudgeNetwork
from scripts.tiny import scenes, world
from scripts.tiny.training import TrainingLoop, augment, bfloat16, optimizer_step, save_weights

CONFIG = {
    "counts": world.COUNTS,
    "colours": world.COLOUR_NAMES,
    "shapes": world.SHAPES,
    "backgrounds": world.BACKGROUNDS,
    "styles": world.STYLES,
    "style_weights": world.STYLE_WEIGHTS,
    "widths": [24, 48, 80, 80],
}
BATCH_SIZE = 96


def train(work, out, steps=1300):
    torch.manual_seed(11)
    images, contents, styles = scenes.load(work, "train")
    judge = JudgeNetwork(CONFIG)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01)
    loop = TrainingLoop("judge", work / "judge_state.pt", optimizer, {"judge": judge}, steps)
    for _ in loop:
        rows = torch.randint(len(images), (BATCH_SIZE,))
        with bfloat16():
            content, amounts = judge(augment(world.to_float(images[rows])))
        loss = sum(cross_entropy(content[name].float(), contents[rows, i]) for i, name in enumerate(CONTENT))
        loss = loss + 4 * (amounts.float() - styles[rows]).square().mean()
        optimizer_step(loss, optimizer)
        loop.show(loss=loss)
    (out / "judge").mkdir(exist_ok=True, parents=True)
    (out / "judge" / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_weights(judge, out / "judge" / "model.safetensors", torch.float16)


@torch.no_grad()
def accuracy(judge, images, contents):
    """Returns the shares of ``images`` [N, 3, 64, 64] in [0, 1] judged as ``contents`` [N, 4]: by name, "all_four"."""
    parts = [judge(part)[0] for part in images.split(256)]
    right = torch.stack(
        [torch.cat([p[name] for p in parts]).argmax(1) == contents[:, i] for i, name in enumerate(CONTENT)], 1
    )
    shares = {name: right[:, i].float().mean().item() for i, name in enumerate(CONTENT)}
    return {**shares, "all_four": right.all(1).float().mean().item()}


@torch.no_grad()
def measured_styles(judge, images):
    """Returns the style amounts [N, 4], as the judge sees them."""
    return torch.cat([judge(part)[1] for part in images.split(256)])
