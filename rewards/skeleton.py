"""Rewards without weights, on torch's meta device: what planning a run's memory needs of them."""

import copy
from collections.abc import Mapping

import torch

from rewards.base import BlankReward, Reward, TowerConfig
from rewards.build import parse_spec
from rewards.combine import WeightedReward
from rewards.preprocess import ClipPreprocess
from rewards.registry import REWARDS, options_name, options_of, reward_class
from rewards.towers import ClipTower


def skeleton_reward(spec: str, options: Mapping[str, Mapping], tower_config: TowerConfig) -> WeightedReward:
    """As `build_reward`, of the same shapes and precision, without files.

    tower_config: as of `Reward.skeleton`.
    Raises: RewardError for a spec that `build_reward` refuses; whatever `tower_config` raises.
    """
    weights = parse_spec(spec)
    terms = {name: _skeleton(name, options, tower_config) for name in weights}
    return WeightedReward(spec, terms, weights).to("meta")


def _skeleton(name: str, options: Mapping[str, Mapping], tower_config: TowerConfig) -> Reward:
    if name not in REWARDS:
        return BlankReward()
    defaults = {option.name: option.default for option in options_of(name)}
    return reward_class(name).skeleton(defaults | dict(options.get(options_name(name), {})), tower_config)


def without_custom(reward: WeightedReward) -> WeightedReward:
    """The same terms where they can be planned, and a `BlankReward` in the place of each other."""
    terms = {name: term if term.plannable else BlankReward() for name, term in reward.terms.items()}
    return WeightedReward(reward.name, terms, reward.weights)


def blank(kind: type) -> Reward:
    """A reward of that class, for whose constructor there are no files."""
    reward = kind.__new__(kind)
    torch.nn.Module.__init__(reward)
    return reward


def clip_tower(config: dict, dtype: str, preprocess=ClipPreprocess, with_text: bool = True) -> ClipTower:
    """A CLIP of that configuration, which reads prompts of full length."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**copy.deepcopy(config)))
    if not with_text:
        del model.text_model, model.text_projection
    return _BlankClip(model, preprocess(model.config.vision_config.image_size), dtype=dtype)


class BlankTokens:
    """Tokens of full length, whatever the prompt."""

    def tokenize(self, prompts) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        return torch.zeros(len(prompts), length, dtype=torch.long, device="meta")


class _BlankClip(BlankTokens, ClipTower):
    pass
