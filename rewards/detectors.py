"""Frozen object detectors of transformers. They find one named object per image, as scored boxes, differentiably."""

import json
import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rewards.base import did_you_mean
from rewards.errors import RewardError
from rewards.files import find_file, load_whole, model_type
from rewards.preprocess import PIL_FILTERS, resize_like_pil
from rewards.towers import load_tokenizer


class Detector(nn.Module):
    """A detection model with its preprocessing, always in float32.

    Args:
        preprocess: Turns images [B, 3, H, W] in [0, 1] into the model's pixels.
        source: The option and model to name in errors.
    """

    usual_threshold: float  # The default threshold for a detection's score in transformers' own post-processing.

    def __init__(self, model: nn.Module, preprocess: nn.Module, source: str):
        super().__init__()
        self.model = model.float().requires_grad_(False).eval()
        self.preprocess, self.source = preprocess, source

    def forward(self, images: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-odds [B, N] that each of N boxes is the named object, and the boxes [B, N, 4].

        The sigmoid of the log-odds is what transformers calls a detection's score. In float32 it saturates and then has
        no gradient. A box is left, top, right, bottom, as shares of the (padded) picture.

        Raises:
            RewardError: The model does not know a name.
        """
        log_odds, boxes = self.detect(self.preprocess(images), names)
        centre, size = boxes.chunk(2, dim=-1)
        return log_odds, torch.cat([centre - size / 2, centre + size / 2], dim=-1)

    def detect(self, pixels: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Does the work of `forward` on preprocessed pixels. A box is given by its centre and size."""
        raise NotImplementedError


class TextDetector(Detector):
    """OWL-ViT (arXiv 2205.06230) or OWLv2 (2306.09683), which detects whatever the text "a photo of a …" names."""

    usual_threshold = 0.1

    def __init__(self, model: nn.Module, preprocess: nn.Module, source: str, tokenizer):
        super().__init__(model, preprocess, source)
        self.tokenizer = tokenizer

    def detect(self, pixels, names):
        length = self.model.config.text_config.max_position_embeddings
        texts = [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
        # No attention mask is needed: the tower is causal and is read at the end token, which never sees the padding.
        tokens = self.tokenizer(
            texts, padding="max_length", padding_side="right", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(pixels.device)
        output = self.model(input_ids=tokens, pixel_values=pixels, return_dict=True)
        return output.logits[..., 0], output.pred_boxes


class ClassDetector(Detector):
    """YOLOS (arXiv 2106.00666) or DETR (2005.12872), which detects the classes of its data set, mostly COCO's 80.

    A name means the longest class that it ends in: "red apple" means "apple", and "teddy bear" does not mean "bear".
    """

    usual_threshold = 0.5

    def __init__(self, model: nn.Module, preprocess: nn.Module, source: str):
        super().__init__(model, preprocess, source)
        self.classes = {label.lower(): int(i) for i, label in model.config.id2label.items() if label != "N/A"}

    def detect(self, pixels, names):
        wanted = torch.tensor([self.class_of(name) for name in names], device=pixels.device)
        output = self.model(pixel_values=pixels, return_dict=True)
        wanted = wanted[:, None, None].expand(-1, output.logits.shape[1], 1)
        # These are the log-odds of a softmax over the classes. The last class is "no object".
        others = output.logits.scatter(2, wanted, -torch.inf).logsumexp(dim=2)
        return output.logits.gather(2, wanted).squeeze(2) - others, output.pred_boxes

    def class_of(self, name: str) -> int:
        return class_named(name, self.classes, self.source)


def class_named(name: str, classes: Mapping[str, int], source: str) -> int:
    """Returns the index of the longest class that a name ends in, of {class in lower case: its index}.

    Raises:
        RewardError: There is none. The message names `source`.
    """
    words = name.lower().split()
    for start in range(len(words)):
        if " ".join(words[start:]) in classes:
            return classes[" ".join(words[start:])]
    hint = did_you_mean(name.lower(), classes) or f"; it knows {', '.join(list(classes)[:8])}, …"
    raise RewardError(f"{source} has no class {name!r}{hint}; an OWL-ViT model detects anything that has a name")


class DetectorPreprocess(nn.Module):
    """Resizes and normalises as a `preprocessor_config.json` says, like the model's own processor.

    Args:
        size: (height, width) if `exact`, else (shortest, longest): the shortest side gets the first length, unless that
            makes the longest side longer than the second.
        multiple: Sides are cut to multiples of this many pixels.
        square: The picture is first padded to a square, with black at the right and the bottom.
        divisor: Sides are then stretched to multiples of this many pixels.
    """

    def __init__(
        self, size, exact: bool, mean, std, mode: str, multiple: int = 1, square: bool = False, divisor: int = 1
    ):
        super().__init__()
        self.size, self.exact, self.mode, self.multiple, self.square = size, exact, mode, multiple, square
        self.divisor = divisor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @classmethod
    def from_json(cls, text: str, kind: str, source: str) -> "DetectorPreprocess":
        """Reads the text of a `preprocessor_config.json`.

        Args:
            kind: The model's `model_type`, a key of DETECTORS or "mask2former".

        Raises:
            RewardError: An entry is missing or not supported.
        """
        is_text = DETECTORS.get(kind) is TextDetector
        try:
            config = json.loads(text)
            config = config.get("image_processor", config)
            size, longest = config["size"], config.get("max_size", 1333)
            if isinstance(size, int):  # older files have a single number
                size = {"height": size, "width": size} if is_text else {"shortest_edge": size, "longest_edge": longest}
            elif not isinstance(size, dict):
                size = dict(zip(("height", "width"), size, strict=True))
            exact = "height" in size
            sides = ("height", "width") if exact else ("shortest_edge", "longest_edge")
            return cls(
                tuple(int(size[side]) for side in sides), exact, config["image_mean"], config["image_std"],
                PIL_FILTERS[config.get("resample", 3 if kind == "owlvit" else 2)],
                multiple=16 if kind == "yolos" else 1, square=kind == "owlv2",
                divisor=int(config.get("size_divisor", 32)) if kind == "mask2former" else 1,
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise RewardError(f"{source} is damaged or not supported: {type(error).__name__}: {error}") from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the normalised pixels [B, 3, h, w] float32 of images [B, 3, H, W] in [0, 1]."""
        height, width = images.shape[-2:]
        if self.square:
            images = F.pad(images, (0, max(height, width) - width, 0, max(height, width) - height))
        return (resize_like_pil(images, *self.fitted(*images.shape[-2:]), self.mode) - self.mean) / self.std

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width in pixels that a picture is resized to."""
        height, width = self.size if self.exact else self._fitted(height, width)
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        shortest, longest = self.size
        short, long = min(height, width), max(height, width)
        exact_short = longest * short / long if shortest * long / short > longest else shortest
        short_side = round(exact_short)
        sides = (short_side, short_side if short == long else int(exact_short * long / short))
        sides = [side - side % self.multiple for side in sides]
        return (sides[0], sides[1]) if height <= width else (sides[1], sides[0])


# The detector for each `model_type` of a config.
DETECTORS = {"owlvit": TextDetector, "owlv2": TextDetector, "yolos": ClassDetector, "detr": ClassDetector}


def load_detector(name: str, revision: str | None, field: str) -> Detector:
    """Loads the detector `name`: a hub name ("google/owlvit-base-patch32") or a folder written by `save_pretrained`.

    Args:
        field: The option to name in an error.

    Raises:
        RewardError: It cannot be found, is not a detector known here, or lacks weights.
    """
    from transformers import AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection

    name, source = os.path.expanduser(name), f"{field}={name!r}"
    kind = model_type(name, revision, field)
    if kind not in DETECTORS:
        raise RewardError(f"{source} is a {kind!r} model, expected a detector: {', '.join(DETECTORS)}")
    preprocess = preprocess_of(name, revision, kind, field)
    is_text = DETECTORS[kind] is TextDetector
    loader = AutoModelForZeroShotObjectDetection if is_text else AutoModelForObjectDetection
    model = load_whole(loader, name, revision, kind, field)
    if is_text:
        side = model.config.vision_config.image_size
        if preprocess.size != (side, side):
            raise RewardError(f"{source}: its pictures are resized to {preprocess.size}, but the model wants {side}")
        tokenizer = load_tokenizer(name, revision, model.config.text_config, field)
        return TextDetector(model, preprocess, source, tokenizer)
    return ClassDetector(model, preprocess, source)


def preprocess_of(name: str, revision: str | None, kind: str, field: str) -> DetectorPreprocess:
    """Reads the preprocessor file of a hub name or folder. Raises a RewardError if it is missing or not supported."""
    # transformers 5 writes processor_config.json when it saves a whole processor.
    try:
        path = find_file(name, "preprocessor_config.json", revision, field)
    except RewardError:
        path = find_file(name, "processor_config.json", revision, field)
    return DetectorPreprocess.from_json(path.read_text(), kind, f"{field}={name!r}, {path.name}")
