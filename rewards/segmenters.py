"""Frozen networks that find the objects of named classes in a picture: with masks (Mask2Former) or as boxes alone."""

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from rewards.detectors import DETECTORS, Detector, DetectorPreprocess, class_named, load_detector, preprocess_of
from rewards.errors import RewardError
from rewards.files import load_whole, model_type

MASK2FORMER = "mask2former"
MOST = 100  # The detections of a picture, over all classes.


class Detection(NamedTuple):
    """One object in a picture of H times W pixels.

    Attributes:
        score: How sure the network is, in [0, 1].
        box: Left, top, right, bottom in pixels; y points down.
        mask: Where the object is, [H, W] bool. None: The network has no masks.
    """

    score: float
    box: tuple[float, float, float, float]
    mask: torch.Tensor | None = None


Found = dict[str, list[Detection]]
"""The detections of a picture by the name of their class."""


class Segmenter(nn.Module):
    """Mask2Former (arXiv 2112.01527) for instances, always in float32. It knows the classes of its data set.

    A name means the longest class that it ends in, as in `ClassDetector`.

    Args:
        model: A `transformers.Mask2FormerForUniversalSegmentation`.
        source: The option and model to name in errors.
    """

    def __init__(self, model: nn.Module, preprocess: nn.Module, source: str):
        super().__init__()
        self.model = model.float().requires_grad_(False).eval()
        self.preprocess, self.source = preprocess, source
        self.classes = {label.lower(): int(i) for i, label in model.config.id2label.items()}

    @torch.no_grad()
    def find(self, image: torch.Tensor, names: Sequence[str], floor: float) -> Found:
        """Returns the detections of each named class in an image [3, H, W] in [0, 1], if their score is above `floor`.

        Raises:
            RewardError: The model does not know a name.
        """
        wanted = {name: class_named(name, self.classes, self.source) for name in names}
        pixels = self.preprocess(image[None])
        output = self.model(pixel_values=pixels)
        probabilities, queries, classes = instances(output.class_queries_logits[0])
        found = {}
        for name, index in wanted.items():
            rows = (classes == index) & (probabilities > floor)  # a score is at most its probability
            logits = full_size(output.masks_queries_logits[0, queries[rows]], pixels.shape[-2:], image.shape[-2:])
            found[name] = [one for one in detections(probabilities[rows], logits) if one.score > floor]
        return found


def instances(class_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the MOST probable pairs of a query and a class: their probabilities, queries and classes, [n] each.

    A query may have several classes. The last class of the logits [queries, classes + 1] is "no object".
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    best, places = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    return best, places // probabilities.shape[1], places % probabilities.shape[1]


def full_size(logits: torch.Tensor, model_size: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Enlarges mask logits [n, h, w] to the model's pixels, then resizes them to the picture's size, as mmdet does."""
    if not len(logits):
        return logits.new_zeros(0, *size)
    for target in (model_size, size):
        logits = F.interpolate(logits[None], tuple(target), mode="bilinear", align_corners=False)[0]
    return logits


def detections(probabilities: torch.Tensor, logits: torch.Tensor) -> list[Detection]:
    """Returns the detections of mask logits [n, H, W] with class probabilities [n]. Empty masks are left out.

    The mask is where the logit is above 0. The score is the class probability times the mean of sigmoid(logit) in the
    mask.
    """
    masks = logits > 0
    inside = (logits.sigmoid() * masks).sum(dim=(1, 2)) / (masks.sum(dim=(1, 2)) + 1e-6)
    scores = (probabilities * inside).tolist()
    return [Detection(score, _box(mask), mask) for score, mask in zip(scores, masks, strict=True) if mask.any()]


def _box(mask: torch.Tensor) -> tuple[float, float, float, float]:
    rows, columns = (mask.any(dim=dim).nonzero() for dim in (1, 0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


class BoxFinder(nn.Module):
    """A detector of boxes (detectors.py) with the interface of `Segmenter`. Its detections have no masks.

    The network is called once for each name.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    @torch.no_grad()
    def find(self, image: torch.Tensor, names: Sequence[str], floor: float) -> Found:
        """See `Segmenter.find`. Boxes are cut at the picture's edges."""
        height, width = image.shape[-2:]
        side = max(height, width)
        padded = (side, side) if self.detector.preprocess.square else (width, height)
        found = {}
        for name in names:
            log_odds, boxes = self.detector(image[None], [name])
            scores = log_odds[0].sigmoid()
            boxes = torch.minimum(
                (boxes[0] * boxes.new_tensor(padded * 2)).clamp(min=0), boxes.new_tensor([width, height] * 2)
            )
            rows = scores > floor
            pairs = zip(scores[rows].tolist(), boxes[rows].tolist(), strict=True)
            found[name] = [Detection(score, tuple(box)) for score, box in pairs]
        return found


def load_finder(name: str, revision: str | None, field: str) -> Segmenter | BoxFinder:
    """Loads a Mask2Former, or a detector that `load_detector` knows, by hub name or from a folder.

    Args:
        field: The option to name in an error.

    Raises:
        RewardError: It cannot be found, is of another kind, lacks weights, or needs a package that is not installed.
    """
    name, source = os.path.expanduser(name), f"{field}={name!r}"
    kind = model_type(name, revision, field)
    if kind in DETECTORS:
        return BoxFinder(load_detector(name, revision, field))
    if kind != MASK2FORMER:
        known = ", ".join([MASK2FORMER, *DETECTORS])
        raise RewardError(f"{source} is a {kind!r} model, expected a model that finds objects: {known}")
    require_scipy(source)
    from transformers import Mask2FormerForUniversalSegmentation

    preprocess = preprocess_of(name, revision, kind, field)
    return Segmenter(load_whole(Mask2FormerForUniversalSegmentation, name, revision, kind, field), preprocess, source)


def blank_segmenter(config: dict) -> Segmenter:
    """Returns a Mask2Former of that configuration without weights, on the meta device. It cannot be run."""
    require_scipy("geneval.model")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**config))
    preprocess = DetectorPreprocess((800, 1333), False, [0.0] * 3, [1.0] * 3, "bilinear")
    return Segmenter(model, preprocess, "")


def require_scipy(source: str) -> None:
    """Raises a RewardError if scipy is missing, without which transformers builds no Mask2Former, even untrained."""
    if importlib.util.find_spec("scipy") is None:
        raise RewardError(f"{source}: transformers' Mask2Former needs the package scipy: pip install scipy")
