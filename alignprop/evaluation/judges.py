"""What judges the pictures of a run: the reward that it is after, others that are only measured, their diversity."""

from dataclasses import dataclass

import torch
from ml_collections import ConfigDict

from alignprop.evaluation.stop_when import MEASURES
from alignprop.prompts import PromptSet
from rewards import OPTIONS_OF, REWARDS, WeightedReward, as_reward, build_reward, parse_spec, try_reward
from rewards.towers import ClipTower, load_clip


@dataclass(frozen=True)
class Judges:
    """
    Attributes:
        reward: the reward of interest.
        extra: further rewards to measure; terms that `reward` has too are not among them.
        tower: the CLIP in whose space pictures of a prompt are compared, where they are.
    """

    reward: WeightedReward
    extra: WeightedReward | None = None
    tower: ClipTower | None = None

    @property
    def phases(self) -> dict[str, tuple[WeightedReward | None, ClipTower | None]]:
        """Which of them judge in which phase (memory.Residency); the tower in that of the reward whose part it is."""
        with_reward = any(module is self.tower for module in self.reward.modules())
        return {
            "decode": (self.reward, self.tower if with_reward else None),
            "measure": (self.extra, None if with_reward else self.tower),
        }

    def try_on(self, images: torch.Tensor, prompts, metadata, needs_gradient: bool, enter) -> None:
        """Scores some pictures, so that a broken reward is found now and not after the first evaluation.

        Raises: rewards.RewardError.
        """
        try_reward(self.reward, images, prompts, metadata, needs_gradient)
        if self.extra:
            enter("measure")
            try_reward(self.extra, images, prompts, metadata, needs_gradient=False)


def build_judges(config: ConfigDict, prompts: PromptSet, reward_function=None) -> Judges:
    """
    Args:
        config: resolved.
        prompts: of the evaluation.
        reward_function: used instead of building `reward_fn`; any `reward(images, prompts, metadata) -> scores [B]`.

    Raises:
        rewards.RewardError: one of them is unknown, or its files cannot be had.
    """
    c = config
    options = {name: c[name].to_dict() for name in {*REWARDS, *OPTIONS_OF.values()} if name in c}
    reward = as_reward(reward_function) if reward_function else build_reward(c.reward_fn, options)
    reward.combination = c.reward_combine
    named = parse_spec(c.eval_reward_fn) if c.eval_reward_fn else []
    others = ",".join(name for name in named if name not in reward.terms)
    extra = build_reward(others, options) if others else None
    return Judges(reward, extra, _find_tower(c, reward, extra) if _is_diverse(c, prompts) else None)


def measured(config: ConfigDict, prompts: PromptSet, reward_function=None) -> list[str]:
    """The names of all that an evaluation of a training run measures, as in its row; loads nothing.

    Args:
        config, prompts, reward_function: as of `build_judges`.
    """
    c = config
    named = [*(as_reward(reward_function).terms if reward_function else parse_spec(c.reward_fn))]
    named += [*(parse_spec(c.eval_reward_fn) if c.eval_reward_fn else ())]
    has = {"diversity": _is_diverse(c, prompts), "base_distance": c.eval_base_distance and c.use_lora}
    return list(dict.fromkeys(["reward", *named, *(name for name in MEASURES if has[name])]))


def diversity(embeddings: torch.Tensor, prompts: list[str]) -> float | None:
    """Mean of 1 - cosine over all pairs of pictures of a prompt, on average over the prompts that have a pair.

    Args:
        embeddings: unit vectors [n, D] of the pictures.
        prompts: n, theirs.

    Returns:
        From 0, where those of a prompt are all the same picture, to 2; None where no prompt has two.
    """
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    found = []
    for rows in (rows for rows in rows_of.values() if len(rows) > 1):
        # The square of the sum holds each pair twice, and each vector with itself.
        n, of_sum = len(rows), embeddings[rows].double().sum(dim=0).square().sum()
        found.append(1 - (of_sum - n) / (n * (n - 1)))
    return torch.stack(found).mean().item() if found else None


def _is_diverse(c: ConfigDict, prompts: PromptSet) -> bool:
    """Whether the diversity of an evaluation is to be measured, and can be: some prompt repeats."""
    return c.eval_diversity and c.num_eval_images > min(c.num_eval_prompts or len(prompts), len(prompts))


def _find_tower(c: ConfigDict, *rewards: WeightedReward | None) -> ClipTower:
    """`clip.model`: that of a reward that is there anyway, or one of its own."""
    same = (c.aesthetic.clip, c.aesthetic.dtype) == (c.clip.model, c.clip.dtype)
    terms = [reward.terms.get(name) for reward in rewards if reward for name in ("clip", "aesthetic")[: 1 + same]]
    towers = [term.tower for term in terms if isinstance(getattr(term, "tower", None), ClipTower)]
    return towers[0] if towers else load_clip(c.clip.model, None, c.clip.dtype, with_text=False, field="clip.model")
