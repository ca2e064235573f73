"""The judges of a run's pictures: the reward of interest, rewards that are only measured, and diversity."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from ml_collections import ConfigDict

from alignprop.evaluation.stop_when import MEASURES
from alignprop.models.base import Phases
from alignprop.prompts import PromptSet
from alignprop.settings.sizes import picture_sizes
from rewards import REWARDS, WeightedReward, as_reward, build_reward, options_name, parse_spec, try_reward
from rewards.towers import ClipTower, load_clip

BuildReward = Callable[[str, Mapping[str, Mapping]], WeightedReward]


def load_tower(config: ConfigDict) -> ClipTower:
    """Loads the image half of `clip.model`, with its weights."""
    c = config.clip
    return load_clip(c.model, c.revision, c.dtype, with_text=False, field="clip.model")


@dataclass(frozen=True)
class Judges:
    """Everything that judges pictures in an evaluation.

    Attributes:
        reward: the reward of interest.
        extra: further rewards to measure, without the terms that `reward` already has.
        tower: the CLIP model that embeds pictures to measure their diversity; None if diversity is not measured.
    """

    reward: WeightedReward
    extra: WeightedReward | None = None
    tower: ClipTower | None = None

    @property
    def phases(self) -> dict[str, tuple[WeightedReward | None, ClipTower | None]]:
        """The judges of each phase (memory/residency.py). The tower belongs to "decode" if `reward` contains it."""
        with_reward = any(module is self.tower for module in self.reward.modules())
        return {
            "decode": (self.reward, self.tower if with_reward else None),
            "measure": (self.extra, None if with_reward else self.tower),
        }

    def judge(
        self, images: list[torch.Tensor], prompts: list[str], metadata: list[dict], phases: Phases, only: str = ""
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Returns the scores of n pictures, [n] for each single reward, and their unit vectors [n, D] for diversity.

        Args:
            images: the n pictures in chunks [b, 3, H, W]; a chunk is judged at once.
            prompts: the n prompts.
            metadata: the metadata rows of the n prompts.
            phases: brings the judges of a phase to the device.
            only: the only phase in which judges are asked; empty means all phases.
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

        Raises:
            rewards.RewardError: a reward is broken.
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
    """Builds the judges that a configuration asks for.

    Args:
        config: the resolved configuration.
        prompts: the evaluation's prompts; None if they are not known yet. Then there are assumed to be at least
            `num_eval_prompts` of them, or `num_eval_images` if that is None.
        reward_function: used instead of building `reward_fn`; any `reward(images, prompts, metadata) -> scores [B]`.
        build: makes a reward from its name and the options of all rewards.
        build_tower: makes the CLIP `clip.model` if no reward has it.

    Raises:
        rewards.RewardError: a reward is unknown, or its files are not available.
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
    """Returns the names of everything that an evaluation of a training run measures, as in its row. Loads nothing.

    Args:
        config, prompts, reward_function: as in `build_judges`.
    """
    c = config
    named = [*(as_reward(reward_function).terms if reward_function else parse_spec(c.reward_fn))]
    named += [*(parse_spec(c.eval_reward_fn) if c.eval_reward_fn else ())]
    has = {"diversity": _is_diverse(c, prompts), "base_distance": c.eval_base_distance and c.use_lora}
    return list(dict.fromkeys(["reward", *named, *(name for name in MEASURES if has[name])]))


def diversity(embeddings: torch.Tensor, prompts: Sequence[Hashable]) -> float | None:
    """Returns the mean of 1 - cosine over all pairs of pictures of a prompt, averaged over the prompts with a pair.

    Args:
        embeddings: the unit vectors [n, D] of the pictures.
        prompts: the prompts of the n pictures, or what else tells which pictures are compared, such as (prompt, size).

    Returns:
        A number from 0 (all pictures of a prompt are the same) to 2; None if no prompt has two pictures.
    """
    distances = []
    for rows in (rows for rows in rows_by(prompts).values() if len(rows) > 1):
        # The square of the sum contains each pair twice, and each vector paired with itself.
        n, of_sum = len(rows), embeddings[rows].double().sum(dim=0).square().sum()
        distances.append(1 - (of_sum - n) / (n * (n - 1)))
    return torch.stack(distances).mean().item() if distances else None


def rows_by(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Returns the positions of each value."""
    positions: dict[Hashable, list[int]] = {}
    for position, value in enumerate(values):
        positions.setdefault(value, []).append(position)
    return positions


def _is_diverse(c: ConfigDict, prompts: PromptSet | None) -> bool:
    """Whether an evaluation measures diversity: it is asked for, and some prompt repeats in the same size."""
    sizes = picture_sizes(c.resolution)
    known = c.num_eval_images if prompts is None else len(prompts)
    used = min(c.num_eval_prompts or known, known, c.num_eval_images // max(len(sizes), 1))
    return c.eval_diversity and c.num_eval_images > used * max(len(set(sizes)), 1)


def _tower(c: ConfigDict, reward: WeightedReward, extra: WeightedReward | None, build_tower) -> ClipTower:
    """Returns the CLIP `clip.model`: the one that a reward already has, or else a newly built one."""
    own, clip = c.aesthetic, c.clip
    same = (own.clip, own.clip_revision, own.dtype) == (clip.model, clip.revision, clip.dtype)
    names = ("clip", "aesthetic")[: 1 + same]
    terms = [judge.terms.get(name) for judge in (reward, extra) if judge for name in names]
    towers = [term.tower for term in terms if isinstance(getattr(term, "tower", None), ClipTower)]
    return towers[0] if towers else build_tower(c)
