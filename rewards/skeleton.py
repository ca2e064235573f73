"""Rewards without weights, on torch's meta device: what planning a run's memory needs of them."""

import copy
from collections.abc import Callable, Mapping

import torch

from rewards import parse_spec
from rewards.aesthetic import AestheticHead, AestheticReward
from rewards.base import Reward
from rewards.clip import ClipReward
from rewards.combine import WeightedReward
from rewards.hps import HPSReward
from rewards.preprocess import ClipPreprocess, PadPreprocess
from rewards.towers import ClipTower

HPS_TOWER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


TowerConfig = Callable[[str, str], dict]


def skeleton_reward(spec: str, options: Mapping[str, Mapping], tower_config: TowerConfig) -> WeightedReward:
    """As `build_reward`, of the same shapes and precision, without files. What has no CLIP tower is a `BlankReward`.

    tower_config: (a CLIP model's name, the option that names it) -> the keywords of its `transformers.CLIPConfig`.
    Raises: RewardError for a spec that `build_reward` refuses; whatever `tower_config` raises.
    """
    weights = parse_spec(spec)
    make = {"aesthetic": _aesthetic, "clip": _clip, "hps": _hps}
    terms = {n: make[n](options[n], tower_config) if n in make else BlankReward() for n in weights}
    return WeightedReward(spec, terms, weights).to("meta")


class BlankReward(Reward):
    """In the place of a reward that may look at values, as a user's own, or that is small beside the others."""

    def score(self, images: torch.Tensor, prompts, metadata) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


def without_custom(reward: WeightedReward) -> WeightedReward:
    """The same terms with CLIP towers, and a `BlankReward` in the place of each other."""
    known = AestheticReward, ClipReward, HPSReward
    terms = {n: term if isinstance(term, known) else BlankReward() for n, term in reward.terms.items()}
    return WeightedReward(reward.name, terms, reward.weights)


def _aesthetic(options: Mapping, tower_config) -> AestheticReward:
    reward = _blank(AestheticReward)
    config = tower_config(options["clip"], "aesthetic.clip")
    reward.tower = _tower(config, options["dtype"], ClipPreprocess, with_text=False)
    with torch.device("meta"):
        reward.head = AestheticHead(reward.tower.model.config.projection_dim).requires_grad_(False)
    return reward


def _clip(options: Mapping, tower_config) -> ClipReward:
    reward = _blank(ClipReward)
    reward.tower = _tower(tower_config(options["model"], "clip.model"), options["dtype"], ClipPreprocess)
    return reward


def _hps(options: Mapping, tower_config) -> HPSReward:
    reward = _blank(HPSReward)
    reward.tower = _tower(tower_config(HPS_TOWER, "hps.checkpoint"), options["dtype"], PadPreprocess)
    return reward


def _blank(kind):
    reward = kind.__new__(kind)
    torch.nn.Module.__init__(reward)
    return reward


class _BlankTower(ClipTower):
    def tokenize(self, prompts) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        return torch.zeros(len(prompts), length, dtype=torch.long, device="meta")


def _tower(config: dict, dtype: str, preprocess, with_text: bool = True) -> ClipTower:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**copy.deepcopy(config)))
    if not with_text:
        del model.text_model, model.text_projection
    return _BlankTower(model, preprocess(model.config.vision_config.image_size), dtype=dtype)
