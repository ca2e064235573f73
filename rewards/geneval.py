"""GenEval (arXiv 2310.11513): whether a picture shows the objects, numbers, colours and places that its prompt names.

The benchmark finds objects with mmdet's Mask2Former. Here it is transformers' Mask2Former, with mmdet's arithmetic from
the logits on (segmenters.py).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F

from rewards.base import Reward, TowerConfig
from rewards.errors import UserError
from rewards.geneval_rules import COLOURS, kept, read_clauses, shares
from rewards.preprocess import TorchvisionPreprocess
from rewards.registry import Precision
from rewards.segmenters import MASK2FORMER, Detection, blank_segmenter, load_finder
from rewards.skeleton import blank, clip_tower
from rewards.towers import load_clip

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = 153 / 255  # what replaces the surroundings of an object before its colour is asked for


class GenEvalReward(Reward):
    """1.0 if all that the prompt's GenEval metadata ask for is in the picture, else 0.0. It has no gradient.

    The metadata of a prompt are those of the benchmark: "tag", "include" and perhaps "exclude". The benchmark's result
    is the mean over the tags of the means of their pictures.

    Args:
        model: The hub name or folder of a Mask2Former for instances of COCO, or of a detector as in count.model, whose
            objects have no masks.
        revision: The branch, tag or commit of the hub's repository. None: the newest.
        clip: The hub name or folder of the CLIP that tells colours.
        clip_revision: The branch, tag or commit of the CLIP's repository. None: the newest.
        dtype: The precision of the CLIP.
        threshold: The score that an object must exceed.
        counting_threshold: The same for prompts whose tag is "counting".
        max_overlap: Of two objects of a class whose intersection over union is at least this, only the surer one
            counts. 1 keeps both, as the benchmark does.
        partial: If True, the score is the mean over the clauses of the share of conditions that hold, in [0, 1], which
            is 1 exactly if the picture is correct. It is not part of the benchmark.

    Raises:
        RewardError: A model cannot be loaded, or the metadata are not those of GenEval.
    """

    differentiable = False
    plannable = True

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        revision: str | None = None,
        clip: str = "openai/clip-vit-large-patch14",
        clip_revision: str | None = None,
        dtype: Precision = "float32",
        threshold: Annotated[float, (0, 1)] = 0.3,
        counting_threshold: Annotated[float, (0, 1)] = 0.9,
        max_overlap: Annotated[float, (0, 1)] = 1.0,
        partial: bool = False,
    ):
        super().__init__()
        self.finder = load_finder(model, revision, field="geneval.model")
        self.tower = load_clip(
            clip, clip_revision, dtype, with_text=True, field="geneval.clip", preprocess=TorchvisionPreprocess
        )
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_overlap, self.partial = max_overlap, partial
        self.colour_vectors: dict[str, torch.Tensor] = {}

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        reward.tower = clip_tower(
            tower_config(options["clip"], "geneval.clip", "clip"), options["dtype"], TorchvisionPreprocess
        )
        try:
            config = tower_config(options["model"], "geneval.model", MASK2FORMER)
        except UserError:  # a detector of another kind, which is small next to the CLIP
            return reward
        reward.finder = blank_segmenter(config)
        return reward

    @torch.no_grad()
    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        if images.is_meta:  # planning: objects cannot be found, and one crop for each picture stands for them
            return self.tower.embed_images(images).sum(dim=1)
        pictures = (images.clamp(0, 1) * 255).round() / 255  # the benchmark reads files of 8 bits
        rows = zip(pictures, prompts, metadata or [{}] * len(prompts), strict=True)
        return images.new_tensor([self.judge(*row) for row in rows])

    def judge(self, picture: torch.Tensor, prompt: str, row: Mapping) -> float:
        """Returns the score of one picture [3, H, W] in [0, 1]."""
        include, exclude = read_clauses(prompt, row)
        threshold = self.counting_threshold if row.get("tag") == "counting" else self.threshold
        names = list(dict.fromkeys(clause.name for clause in (*include, *exclude)))
        found = self.finder.find(picture, names, threshold)
        found = {name: kept(ones, threshold, self.max_overlap) for name, ones in found.items()}
        held = shares(include, exclude, found, lambda name, ones: self.colours_of(picture, name, ones))
        return sum(held) / len(held) if self.partial else float(all(share == 1 for share in held))

    def colours_of(self, picture: torch.Tensor, name: str, detections: Sequence[Detection]) -> list[str]:
        """Returns the colour of each detection: that of COLOURS whose texts are nearest to the object, by CLIP."""
        crops = torch.cat([self.tower.embed_images(cut_out(picture, one)[None]) for one in detections])
        nearest = (crops @ self._vectors(name).to(crops.device).T).argmax(dim=1)
        return [COLOURS[i] for i in nearest.tolist()]

    def _vectors(self, name: str) -> torch.Tensor:
        """Returns a unit vector for each of COLOURS, [10, D]: the mean over TEMPLATES. It is remembered."""
        if name not in self.colour_vectors:
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in TEMPLATES]
            vectors = self.tower.embed_prompts(texts).view(len(COLOURS), len(TEMPLATES), -1)
            self.colour_vectors[name] = F.normalize(vectors.mean(dim=1), dim=-1)
        return self.colour_vectors[name]


def cut_out(image: torch.Tensor, one: Detection) -> torch.Tensor:
    """Returns an object of an image [3, H, W], cut to its box, [3, h, w]; if it has a mask, on grey."""
    if one.mask is not None:
        image = torch.where(one.mask, image, GREY)
    left, top, right, bottom = map(round, one.box)
    left, top = min(left, image.shape[2] - 1), min(top, image.shape[1] - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
