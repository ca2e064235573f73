"""Rewards without weights, on torch's meta device: what planning a run's memory needs of them."""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch

from rewards import parse_spec
from rewards.aesthetic import AestheticHead, AestheticReward
from rewards.base import Reward
from rewards.clip import ClipReward
from rewards.combine import WeightedReward
from rewards.hps import HPSReward
from rewards.imagereward import PROMPT_LENGTH, BlipTower, ImageReward, build_blip
from rewards.pickscore import PickScoreReward
from rewards.preprocess import ClipPreprocess, PadPreprocess, SquashPreprocess
from rewards.siglip import SiglipReward, SiglipTower
from rewards.towers import ClipTower

# Whose sizes the checkpoints have that are no folders of transformers'.
HPS_TOWER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
IMAGEREWARD_TOWER = "THUDM/ImageReward"
KNOWN = AestheticReward, ClipReward, HPSReward, ImageReward, PickScoreReward, SiglipReward


TowerConfig = Callable[[str, str, str], dict]


def skeleton_reward(spec: str, options: Mapping[str, Mapping], tower_config: TowerConfig) -> WeightedReward:
    """As `build_reward`, of the same shapes and precision, without files. What has no towers is a `BlankReward`.

    tower_config: (a model's name, the option that names it, "clip", "siglip" or "blip") -> the keywords of its
    `transformers.CLIPConfig`, `SiglipConfig` or `BlipConfig`.
    Raises: RewardError for a spec that `build_reward` refuses; whatever `tower_config` raises.
    """
    weights = parse_spec(spec)
    make = {
        "aesthetic": _aesthetic, "hps": _hps, "imagereward": _imagereward, "siglip": _siglip,
        "clip": partial(_of_a_clip, "clip", ClipReward),
        "pickscore": partial(_of_a_clip, "pickscore", PickScoreReward),
    }  # fmt: skip
    terms = {n: make[n](options[n], tower_config) if n in make else BlankReward() for n in weights}
    return WeightedReward(spec, terms, weights).to("meta")


class BlankReward(Reward):
    """In the place of a reward that may look at values, as a user's own, or that is small beside the others."""

    def score(self, images: torch.Tensor, prompts, metadata) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


def without_custom(reward: WeightedReward) -> WeightedReward:
    """The same terms with towers of ours, and a `BlankReward` in the place of each other."""
    terms = {n: term if isinstance(term, KNOWN) else BlankReward() for n, term in reward.terms.items()}
    return WeightedReward(reward.name, terms, reward.weights)


def _aesthetic(options: Mapping, tower_config: TowerConfig) -> AestheticReward:
    reward = _blank(AestheticReward)
    config = tower_config(options["clip"], "aesthetic.clip", "clip")
    reward.tower = _clip_tower(config, options["dtype"], with_text=False)
    reward.head = _head(reward.tower.model.config.projection_dim)
    return reward


def _hps(options: Mapping, tower_config: TowerConfig) -> HPSReward:
    reward = _blank(HPSReward)
    config = tower_config(HPS_TOWER, "hps.checkpoint", "clip")
    reward.tower = _clip_tower(config, options["dtype"], PadPreprocess)
    return reward


def _imagereward(options: Mapping, tower_config: TowerConfig) -> ImageReward:
    from transformers import BlipTextConfig, BlipVisionConfig

    reward = _blank(ImageReward)
    config = copy.deepcopy(tower_config(IMAGEREWARD_TOWER, "imagereward.checkpoint", "blip"))
    vision, text = BlipVisionConfig(**config["vision_config"]), BlipTextConfig(**config["text_config"])
    with torch.device("meta"):
        reward.blip = _BlankBlip(*build_blip(vision, text), dtype=options["dtype"])
    reward.head = _head(text.hidden_size)
    return reward


def _of_a_clip(name: str, kind: type, options: Mapping, tower_config: TowerConfig) -> ClipReward | PickScoreReward:
    reward = _blank(kind)
    reward.tower = _clip_tower(tower_config(options["model"], f"{name}.model", "clip"), options["dtype"])
    return reward


def _siglip(options: Mapping, tower_config: TowerConfig) -> SiglipReward:
    from transformers import SiglipConfig, SiglipModel

    reward = _blank(SiglipReward)
    config = SiglipConfig(**copy.deepcopy(tower_config(options["model"], "siglip.model", "siglip")))
    with torch.device("meta"):
        model = SiglipModel(config)
    reward.tower = _BlankSiglip(model, SquashPreprocess(config.vision_config.image_size), dtype=options["dtype"])
    return reward


def _blank(kind):
    reward = kind.__new__(kind)
    torch.nn.Module.__init__(reward)
    return reward


def _head(width: int) -> AestheticHead:
    with torch.device("meta"):
        return AestheticHead(width).requires_grad_(False).eval()


def _clip_tower(config: dict, dtype: str, preprocess=ClipPreprocess, with_text: bool = True) -> ClipTower:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**copy.deepcopy(config)))
    if not with_text:
        del model.text_model, model.text_projection
    return _BlankClip(model, preprocess(model.config.vision_config.image_size), dtype=dtype)


class _BlankTokens:
    def tokenize(self, prompts) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        return torch.zeros(len(prompts), length, dtype=torch.long, device="meta")


class _BlankClip(_BlankTokens, ClipTower):
    pass


class _BlankSiglip(_BlankTokens, SiglipTower):
    pass


class _BlankBlip(BlipTower):
    def tokenize(self, prompts) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(prompts), PROMPT_LENGTH, dtype=torch.long, device="meta")
        return tokens, tokens
