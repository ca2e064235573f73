"""LPIPS (arXiv 1801.03924), version 0.1: how different two pictures look, by the features of AlexNet or VGG-16."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from rewards.base import Reward, TowerConfig
from rewards.checkpoints import find_checkpoint
from rewards.errors import RewardError
from rewards.files import check_weights, load_weights
from rewards.preprocess import resize
from rewards.registry import Precision
from rewards.skeleton import blank
from rewards.target import BlankTargets, TargetReward
from rewards.towers import DTYPES

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
EPSILON = 1e-10


@dataclass(frozen=True)
class Trunk:
    """The part of a network's `features`, as torchvision numbers them, up to the last layer that LPIPS reads.

    Attributes:
        file: Torchvision's file of the weights.
        convolutions: Position -> (kernel, stride, padding). The positions that are in neither dict are ReLUs.
        pools: Position -> the kernel of a maximum, of stride 2.
        taps: The five positions whose outputs are compared.
        widths: The channels of the convolutions.
        smallest: The least side of a picture in pixels.
    """

    file: str
    convolutions: dict[int, tuple[int, int, int]]
    pools: dict[int, int]
    taps: tuple[int, ...]
    widths: tuple[int, ...]
    smallest: int


NETS = {
    "alex": Trunk(
        "alexnet-owt-7be5be79.pth", {0: (11, 4, 2), 3: (5, 1, 2), 6: (3, 1, 1), 8: (3, 1, 1), 10: (3, 1, 1)},
        {2: 3, 5: 3}, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31,
    ),
    "vgg": Trunk(
        "vgg16-397923af.pth", dict.fromkeys((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (3, 1, 1)),
        dict.fromkeys((4, 9, 16, 23), 2), (3, 8, 15, 22, 29), (*[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6), 16,
    ),
}  # fmt: skip


class LpipsReward(TargetReward):
    """Minus the LPIPS distance of the picture from its target, the picture that its metadata name; at most 0.

    The target is resized and cropped to the picture's size. The picture itself is not resized.

    Args:
        net: The network whose features are compared.
        lin: A file with the weights of the features ("lin0.model.1.weight" …). None: that of the package lpips.
        trunk: A local file with torchvision's weights of the network, or its name in trunk_repo. None: torchvision's
            own file, in trunk_repo or in torch.hub's cache.
        trunk_repo: A hub repository with the weights of the network, or a folder.
        trunk_revision: The branch, tag or commit of the hub's repository. None: the newest.
        dtype: The precision of the network. A lower one disturbs the gradient.

    Raises:
        RewardError: A file is missing or does not fit.
    """

    plannable = True

    def __init__(
        self,
        net: Literal["alex", "vgg"] = "alex",
        lin: str | None = None,
        trunk: str | None = None,
        trunk_repo: str | None = None,
        trunk_revision: str | None = None,
        dtype: Precision = "float32",
    ):
        super().__init__()
        self.tower = load_trunk(net, find_trunk(NETS[net], trunk, trunk_repo, trunk_revision), dtype)
        self.head = load_lin(lin or find_lin(net), self.tower.tap_widths)

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(_BlankLpips)
        with torch.device("meta"):
            reward.tower = TrunkTower(NETS[options["net"]], dtype=options["dtype"])
            reward.head = nn.ParameterList(torch.empty(width) for width in reward.tower.tap_widths)
        return reward

    def prepare(self, target: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return cover(target, height, width)

    def compare(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if min(images.shape[-2:]) < self.tower.kind.smallest:
            raise RewardError(
                f"lpips.net reads pictures of {self.tower.kind.smallest} pixels a side or more, not of "
                f"{images.shape[-2]} x {images.shape[-1]}"
            )
        with torch.no_grad():
            wanted = self.tower(targets)
        distances = [
            torch.einsum("bchw,c->bhw", (a - b).square(), weight).mean(dim=(1, 2))
            for a, b, weight in zip(self.tower(images), wanted, self.head, strict=True)
        ]
        return -sum(distances)


class _BlankLpips(BlankTargets, LpipsReward):
    pass


class TrunkTower(nn.Module):
    """The frozen convolutions of a network, from pictures in [0, 1] to the five feature maps that LPIPS compares.

    Args:
        widths: The channels of the convolutions. None: the published ones.
        dtype: The precision, a key of DTYPES (towers.py).
    """

    def __init__(self, kind: Trunk, widths: Sequence[int] | None = None, dtype: str = "float32"):
        super().__init__()
        self.kind, self.dtype = kind, DTYPES[dtype]
        channels, layers = [3, *(widths or kind.widths)], []
        for place in range(kind.taps[-1] + 1):
            if place in kind.convolutions:
                layers.append(nn.Conv2d(channels.pop(0), channels[0], *kind.convolutions[place]))
            else:
                layers.append(nn.MaxPool2d(kind.pools[place], 2) if place in kind.pools else nn.ReLU())
        self.features = nn.Sequential(*layers).to(self.dtype).requires_grad_(False).eval()
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @property
    def tap_widths(self) -> list[int]:
        widths = {
            place: layer.out_channels for place, layer in enumerate(self.features) if place in self.kind.convolutions
        }
        return [widths[tap - 1] for tap in self.kind.taps]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Returns maps [B, C, h, w] float32, of length 1 along C, of images [B, 3, H, W] in [0, 1]; differentiable."""
        x, maps = ((2 * images - 1 - self.shift) / self.scale).to(self.dtype), []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.kind.taps:
                length = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)
                maps.append(x.float() / (length + EPSILON))
        return maps


def cover(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes a picture [1, 3, h, w] until it covers height x width, and cuts out the centre. It distorts nothing."""
    scale = max(height / picture.shape[-2], width / picture.shape[-1])
    larger = [max(side, round(old * scale)) for side, old in zip((height, width), picture.shape[-2:], strict=True)]
    picture = resize(picture, *larger).clamp(0, 1)
    top, left = (larger[0] - height) // 2, (larger[1] - width) // 2
    return picture[..., top : top + height, left : left + width]


def find_trunk(kind: Trunk, file: str | None, repo: str | None, revision: str | None) -> Path:
    """Returns the path of a network's weights. Raises a RewardError that says where they can be had."""
    cached = Path(torch.hub.get_dir(), "checkpoints", kind.file)
    if file is None and repo is None and cached.is_file():
        return cached
    hint = f"torchvision's is at https://download.pytorch.org/models/{kind.file}"
    return find_checkpoint(file or kind.file, repo, revision, ("lpips.trunk", "lpips.trunk_repo"), hint)


def find_lin(net: str) -> Path:
    """Returns the path of the package's own weights of features. Raises a RewardError if it is not installed."""
    package = find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise RewardError(
            "lpips.lin=None takes the weights from the package lpips, which is not installed: pip install --no-deps "
            "lpips, or name a file"
        )
    return Path(package.submodule_search_locations[0], "weights", "v0.1", f"{net}.pth")


def load_trunk(net: str, path: Path, dtype: str) -> TrunkTower:
    """Loads the weights "features.…" of a network, whose widths may be smaller. Raises a RewardError for others."""
    source = f"lpips.trunk={str(path)!r}"
    kind, weights = NETS[net], load_weights(path, "lpips.trunk")
    last = max(kind.convolutions)
    names = [name for name in weights if name.startswith("features.") and name.split(".")[1].isdecimal()]
    features = {name: weights[name] for name in names if int(name.split(".")[1]) <= last}
    try:
        widths = [len(features[f"features.{place}.bias"]) for place in kind.convolutions]
    except (KeyError, TypeError) as error:
        raise RewardError(f"{source} is not in torchvision's layout of {net}: no usable {error}") from error
    with torch.device("meta"):
        check_weights(features, TrunkTower(kind, widths), source, f"torchvision's {net}")
    tower = TrunkTower(kind, widths, dtype)
    tower.load_state_dict(features)
    return tower


def load_lin(path: str | Path, widths: Sequence[int]) -> nn.ParameterList:
    """Loads the weights [C] of the features from the package's layout, or from that of a whole LPIPS module.

    Raises:
        RewardError: The file is missing, or its weights do not fit the network.
    """
    weights, lins = load_weights(path, "lpips.lin"), []
    for i, width in enumerate(widths):
        lin = weights.get(f"lin{i}.model.1.weight")
        if not isinstance(lin, torch.Tensor) or lin.shape != (1, width, 1, 1):
            found = list(lin.shape) if isinstance(lin, torch.Tensor) else lin
            raise RewardError(f"lpips.lin={str(path)!r}: lin{i}.model.1.weight is {found}, expected [1, {width}, 1, 1]")
        lins.append(nn.Parameter(lin.float().flatten(), requires_grad=False))
    return nn.ParameterList(lins)
