"""What judges the pictures of a run: the reward that it is after, others that are only measured, their diversity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from ml_collections import ConfigDict

from alignprop.evaluation.stop_when import MEASURES
from alignprop.models.base import Phases
from alignprop.prompts import PromptSet
from rewards import REWARDS, WeightedReward, as_reward, build_reward, options_name, parse_spec, try_reward
from rewards.towers import ClipTower, load_clip

BuildReward = Callable[[str, Mapping[str, Mapping]], WeightedReward]


def load_tower(config: ConfigDict) -> ClipTower:
    """The image half of `clip.model`, with its weights."""
    c = config.clip
    return load_clip(c.model, c.revision, c.dtype, with_text=False, field="clip.model")


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
        """Which of them judge in which phase (memory/residency.py); the tower with the reward that has it."""
        with_reward = any(module is self.tower for module in self.reward.modules())
        return {
            "decode": (self.reward, self.tower if with_reward else None),
            "measure": (self.extra, None if with_reward else self.tower),
        }

    def judge(
        self, images: list[torch.Tensor], prompts: list[str], metadata: list[dict], phases: Phases, only: str = ""
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The scores of pictures, [n] for each single reward, and the unit vectors [n, D] that their diversity needs.

        Args:
            images: chunks [b, 3, H, W] of the n pictures, each of which is judged at once.
            phases: brings the judges of a phase to the device.
            only: the one phase whose judges are asked; empty: all.
        """
        scores, embeddings = {}, None
        for phase, (reward, tower) in self.phases.items():
            if not (reward or tower) or only not in ("", phase):
                continue
            with phases(phase):
                if reward:
                    scores |= _score(reward, images, prompts, metadata)
                if tower:
                    embeddings = torch.cat([tower.embed_images(chunk) for chunk in images])
        return scores, embeddings

    def try_on(self, images: torch.Tensor, prompts, metadata, needs_gradient: bool, phases: Phases) -> None:
        """Scores some pictures, so that a broken reward is found now and not after the first evaluation.

        Raises: rewards.RewardError.
        """
        with phases("decode"):
            try_reward(self.reward, images, prompts, metadata, needs_gradient)
        if self.extra:
            with phases("measure"):
                try_reward(self.extra, images, prompts, metadata, needs_gradient=False)


def _score(reward: WeightedReward, images: list[torch.Tensor], prompts, metadata) -> dict[str, torch.Tensor]:
    chunks, first = [], 0
    for chunk in images:
        rows = slice(first, first + len(chunk))
        chunks.append(reward.score_terms(chunk, prompts[rows], metadata[rows]))
        first += len(chunk)
    return {name: torch.cat([scores[name] for scores in chunks]) for name in chunks[0]}


def build_judges(
    config: ConfigDict, prompts: PromptSet | None, reward_function=None, build: BuildReward = build_reward,
    build_tower: Callable[[ConfigDict], ClipTower] = load_tower,
) -> Judges:  # fmt: skip
    """
    Args:
        config: resolved.
        prompts: of the evaluation; None where they are not known yet: more than the configuration's number of them.
        reward_function: used instead of building `reward_fn`; any `reward(images, prompts, metadata) -> scores [B]`.
        build: makes a reward of its name and the options of all rewards.
        build_tower: makes the CLIP `clip.model`, where no reward has it.

    Raises:
        rewards.RewardError: one of them is unknown, or its files cannot be had.
    """
    c = config
    options = {name: c[name].to_dict() for name in {options_name(reward) for reward in REWARDS} if name in c}
    reward = as_reward(reward_function) if reward_function else build(c.reward_fn, options)
    reward.combination = c.reward_combine
    named = parse_spec(c.eval_reward_fn) if c.eval_reward_fn else []
    others = ",".join(name for name in named if name not in reward.terms)
    extra = build(others, options) if others else None
    return Judges(reward, extra, _tower(c, reward, extra, build_tower) if _is_diverse(c, prompts) else None)


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
    distances = []
    for rows in (rows for rows in rows_of.values() if len(rows) > 1):
        # The square of the sum holds each pair twice, and each vector with itself.
        n, of_sum = len(rows), embeddings[rows].double().sum(dim=0).square().sum()
        distances.append(1 - (of_sum - n) / (n * (n - 1)))
    return torch.stack(distances).mean().item() if distances else None


def _is_diverse(c: ConfigDict, prompts: PromptSet | None) -> bool:
    """Whether the diversity of an evaluation is to be measured, and can be: some prompt repeats."""
    known = c.num_eval_images if prompts is None else len(prompts)
    return c.eval_diversity and c.num_eval_images > min(c.num_eval_prompts or known, known)


def _tower(c: ConfigDict, reward: WeightedReward, extra: WeightedReward | None, build_tower) -> ClipTower:
    """`clip.model`: that of a reward that is there anyway, or one of its own."""
    own, clip = c.aesthetic, c.clip
    same = (own.clip, own.clip_revision, own.dtype) == (clip.model, clip.revision, clip.dtype)
    names = ("clip", "aesthetic")[: 1 + same]
    terms = [judge.terms.get(name) for judge in (reward, extra) if judge for name in names]
    towers = [term.tower for term in terms if isinstance(getattr(term, "tower", None), ClipTower)]
    return towers[0] if towers else build_tower(c)
