"""Builds rewards without weights on torch's meta device, to plan a run's memory."""

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
    """Returns a reward of the shapes and precision that `build_reward` gives, without loading files.

    Whatever `tower_config` raises is passed on.

    Args:
        tower_config: See `Reward.skeleton`.

    Raises:
        RewardError: `build_reward` refuses the spec.
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
    """Returns the reward with a `BlankReward` in place of each term that cannot be planned."""
    terms = {name: term if term.plannable else BlankReward() for name, term in reward.terms.items()}
    return WeightedReward(reward.name, terms, reward.weights)


def blank(kind: type) -> Reward:
    """Returns a reward of that class without calling its constructor, because that needs files."""
    reward = kind.__new__(kind)
    torch.nn.Module.__init__(reward)
    return reward


def clip_tower(config: dict, dtype: str, preprocess=ClipPreprocess, with_text: bool = True) -> ClipTower:
    """Returns a CLIP of that configuration, which takes every prompt as one of full length."""
    model = blank_clip_model(config)
    if not with_text:
        del model.text_model, model.text_projection
    return _BlankClip(model, preprocess(model.config.vision_config.image_size), dtype=dtype)


def blank_clip_model(config: dict):
    """Returns transformers' CLIPModel of that configuration on the meta device."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        return CLIPModel(CLIPConfig(**copy.deepcopy(config)))


class BlankTokens:
    """Makes tokens of full length, whatever the prompt."""

    def tokenize(self, prompts) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        return torch.zeros(len(prompts), length, dtype=torch.long, device="meta")


class _BlankClip(BlankTokens, ClipTower):
    pass
