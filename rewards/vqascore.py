"""VQAScore (arXiv 2404.01291): how probable it is that a model of pictures and text says that the picture shows it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError
from rewards.files import read_config
from rewards.registry import Precision
from rewards.skeleton import blank
from rewards.vqa_llava import blank_llava, load_llava
from rewards.vqa_qwen import blank_qwen, load_qwen
from rewards.vqa_t5 import blank_clip_t5, load_clip_t5


class Family(NamedTuple):
    """A kind of model that can be asked. Both functions return a network of (images, prompts).

    The network returns the logarithms [B] float32 of the answer's probabilities. It has the attributes `model`, a model
    of transformers, and `preprocess`, which prepares the pixels.

    Attributes:
        load: A function of (hub name or folder, revision, what its config.json says, tokenizer, dtype, the option to
            name in an error). It raises a RewardError if the files do not fit.
        blank: A function of (what its config.json says, `tower_config` of `Reward.skeleton`, dtype, the option to name
            in an error). Its network is on the meta device.
        example: The hub name of such a model.
    """

    load: Callable[[str, str | None, Mapping, str | None, str, str], nn.Module]
    blank: Callable[[Mapping, TowerConfig, str, str], nn.Module]
    example: str


# By `model_type` in a model's config.json. CLIP-FlanT5's own class calls itself "clip_t5". Its training code saves the
# configuration of the T5 that it began with, which calls itself "t5".
FAMILIES = {
    "qwen2_5_vl": Family(load_qwen, blank_qwen, "Qwen/Qwen2.5-VL-7B-Instruct"),
    "clip_t5": Family(load_clip_t5, blank_clip_t5, "zhiqiulin/clip-flant5-xl"),
    "t5": Family(load_clip_t5, blank_clip_t5, "zhiqiulin/clip-flant5-xl"),
    "llava": Family(load_llava, blank_llava, "llava-hf/llava-1.5-7b-hf"),
}


class VQAScoreReward(Reward):
    """The probability, from 0 to 1, that the answer to 'Does this figure show "…"?' is Yes.

    It is the score of the t2v_metrics package for models of the same family, made differentiable. Each family has the
    question of that package. A probability near 0 or 1 has almost no gradient, and its logarithm has none near 1.

    Args:
        model: The hub name or folder of a Qwen2.5-VL, a CLIP-FlanT5 or a LLaVA-1.5.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        tokenizer: The hub name or folder of another tokenizer. None: that of the model, and google/flan-t5-xl for a
            CLIP-FlanT5.
        log: The score is the logarithm of the probability, at most 0.
        dtype: The precision of the model, which was trained in bfloat16; the probability is computed in float32.

    Raises:
        RewardError: The model cannot be loaded, is of another family, or its tokenizer does not fit; or a picture is
            too narrow for a Qwen2.5-VL.
    """

    plannable = True

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        revision: str | None = None,
        tokenizer: str | None = None,
        log: bool = False,
        dtype: Precision = "bfloat16",
    ):
        super().__init__()
        field = "vqascore.model"
        facts = read_config(model, revision, field)
        family = find_family(facts.pop("model_type", None), model, field)
        self.log, self.tower = log, family.load(model, revision, facts, tokenizer, dtype, field)

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward, name, field = blank(cls), options["model"], "vqascore.model"
        facts = dict(tower_config(name, field, "vlm"))
        family = find_family(facts.pop("model_type", None), name, field)
        reward.log, reward.tower = False, family.blank(facts, tower_config, options["dtype"], f"{field}={name!r}")
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        logarithms = self.tower(images, prompts)
        return logarithms if self.log else logarithms.exp()


def find_family(kind: str | None, name: str, field: str) -> Family:
    """Returns the family of a model type. Raises a RewardError if there is none, which names those that there are."""
    if kind not in FAMILIES:
        known = ", ".join(f"{kind!r} ({family.example})" for kind, family in FAMILIES.items())
        raise RewardError(f"{field}={name!r} is a {kind!r} model; expected one of {known}")
    return FAMILIES[kind]
