"""An independent judge of the tiny model's pictures: true style rating and obedience to the prompt.

The judge is a small convolutional network, trained on drawn scenes only (``scripts/tiny/judge.py``). It shares nothing
with the CLIP and the aesthetic head, which alignment may optimise. It has a count class "four or more", so that it
finds a picture crowded with shapes wrong. A config names it as ``rewards.tiny_judge:rating`` and
``rewards.tiny_judge:obedience``. Both are for measuring, not for training (``differentiable = False``).
"""

import json
import re
from functools import cache
from pathlib import Path

import torch
from torch import nn

from rewards.errors import RewardError

FOLDER = Path(__file__).resolve().parent.parent / "alignprop" / "assets" / "tiny" / "judge"
CONTENT = ("count", "colour", "shape", "background")
_CAPTION = re.compile(r"(a|an|two|three) (\w+) (\w+?)s? on an? (\w+) background")


class JudgeNetwork(nn.Module):
    """Maps images [B, 3, 64, 64] in [0, 1] to logits for each content name and to style amounts [B, styles].

    Args:
        config: ``widths`` (the channels of the stages, each of which halves the picture) and the lists ``counts``,
            ``colours``, ``shapes``, ``backgrounds``, ``styles``, ``style_weights``.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        layers, channels = [], 3
        for width in config["widths"]:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
            channels = width
        self.sizes = [len(config[f"{name}s"]) for name in CONTENT] + [len(config["styles"])]
        side = 64 // 2 ** len(config["widths"])
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, sum(self.sizes)))

    def forward(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if images.shape[-2:] != (64, 64):
            images = nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        *content, styles = self.network(2 * images - 1).split(self.sizes, dim=1)
        return dict(zip(CONTENT, content, strict=True)), styles


def rating(images, prompts, metadata):
    """Returns the style rating of ``images`` [B, 3, H, W] in [0, 1] as the judge sees it: [B], 1 (plain) to 10."""
    return style_rating(*_judged(images))


def style_rating(judge, _content, styles):
    weights = styles.new_tensor(judge.config["style_weights"])
    return 1 + 9 * (styles.clamp(0, 1) * weights).sum(1)


def obedience(images, prompts, metadata):
    """Returns 1.0 if count, colour, shape and background are all as the prompt says, else 0.0: [B].

    Raises:
        RewardError: A prompt is not of the form "two red circles on a blue background".
    """
    return torch.stack(list(content_right(images, prompts).values())).all(0).float()


def content_right(images, prompts) -> dict[str, torch.Tensor]:
    """Returns which ``images`` [B, 3, H, W] are right in "count", "colour", "shape" and "background", [B] bool each."""
    judge, content, _ = _judged(images)
    wanted = torch.tensor([parse(prompt, judge.config) for prompt in prompts], device=images.device)
    return {name: content[name].argmax(1) == wanted[:, i] for i, name in enumerate(CONTENT)}


rating.differentiable = False
obedience.differentiable = False


def parse(prompt: str, config: dict) -> list[int]:
    """Returns the content indices (count, colour, shape, background) that ``prompt`` names."""
    match = _CAPTION.fullmatch(prompt.strip())
    try:
        head, colour, shape, background = match.groups()
        count = {"a": 0, "an": 0, "two": 1, "three": 2}[head]
        return [count, config["colours"].index(colour), config["shapes"].index(shape),
                config["backgrounds"].index(background)]  # fmt: skip
    except (AttributeError, ValueError):
        colours, shapes, backgrounds = ("/".join(config[name]) for name in ("colours", "shapes", "backgrounds"))
        raise RewardError(
            f"prompt {prompt!r}: the judge reads only '<a|two|three> <colour> <shape>[s] on a <colour> background', "
            f"colours {colours}, shapes {shapes}, backgrounds {backgrounds}; for other prompts, take tiny_count and "
            "rewards.tiny_judge out of reward_fn and eval_reward_fn, for example with --config.eval_reward_fn="
        ) from None


def load(folder=FOLDER) -> JudgeNetwork:
    """Loads the judge saved in ``folder`` (``config.json`` and ``model.safetensors``), frozen, in float32."""
    from safetensors.torch import load_file

    judge = JudgeNetwork(json.loads((Path(folder) / "config.json").read_text()))
    judge.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return judge.float().eval().requires_grad_(False)


@cache
def _bundled(device):
    return load().to(device)


@torch.no_grad()
def _judged(images):
    judge = _bundled(images.device)
    content, styles = judge(images.float())
    return judge, content, styles
