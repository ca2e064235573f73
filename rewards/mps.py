"""MPS (arXiv 2405.14705): a CLIP ViT-H/14 with cross-attention to those words of the prompt that matter for quality."""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from rewards.base import Reward, TowerConfig
from rewards.checkpoints import find_checkpoint, load_module_weights
from rewards.cross_attention import HEAD_WIDTH, CrossModel
from rewards.errors import RewardError
from rewards.files import check_weights
from rewards.preprocess import ClipPreprocess
from rewards.registry import Precision
from rewards.skeleton import BlankTokens, blank, blank_clip_model
from rewards.towers import ClipTower, load_preprocess, load_tokenizer
from rewards.vit_h import SIZES_OF, load_vit_h

# What the overall score is about. The texts of the paper's other three scores are not published.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.01  # of a word's likeness to the condition, relative to the most alike word of the prompt

SOURCE = "github.com/Kwai-Kolors/MPS links to it"
LAYOUT = "MPS's"
RENAMES = (
    (r"^cross_model\.layers\.(\d+)\.0\.fn\.", r"layers.\1.cross."),
    (r"^cross_model\.layers\.(\d+)\.1\.fn\.", r"layers.\1.own."),
)
# Constants that are in the file as well: positions 0, 1, 2, …, zeros, and the frequencies of rotary positions.
UNUSED = re.compile(r"model\.(text|vision)_model\.embeddings\.position_ids|cross_model\..*(norm\.bias|inv_freq)")


class MpsReward(Reward):
    """The overall Multi-dimensional Preference Score: the model's logit scale (about 100) times a cosine.

    It is the score of the published `forward`, with its threshold 0.01, made differentiable. There a word's likeness is
    divided by the largest one of the batch. Here it is the largest one of its own prompt, as in a batch of one, so that
    a picture's score does not depend on its neighbours.

    Args:
        checkpoint: A local file, or the name of the file in checkpoint_repo: the released module, or its state dict.
        checkpoint_repo: A hub repository with the checkpoint, or a folder. None: checkpoint is a local file.
        checkpoint_revision: The branch, tag or commit of the hub's repository. None: the newest.
        processor: The hub name or folder of the tokenizer and the preprocessing. Its padding token matters.
        dtype: The precision of the networks. A lower one disturbs the gradient.

    Raises:
        RewardError: A file is missing or does not fit.
    """

    plannable = True

    def __init__(
        self,
        checkpoint: str = "MPS_overall_checkpoint.pth",
        checkpoint_repo: str | None = None,
        checkpoint_revision: str | None = None,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        dtype: Precision = "float32",
    ):
        super().__init__()
        fields = ("mps.checkpoint", "mps.checkpoint_repo")
        path = find_checkpoint(checkpoint, checkpoint_repo, checkpoint_revision, fields, SOURCE)
        model, cross = load_networks(load_module_weights(path, fields[0]), f"mps.checkpoint={str(path)!r}")
        size = model.config.vision_config.image_size
        preprocess = load_preprocess(ClipPreprocess, processor, None, size, "mps.processor")
        tokenizer = load_tokenizer(processor, None, model.config.text_config, "mps.processor")
        self.tower = MpsTower(model, cross, preprocess, tokenizer, dtype)

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        model = blank_clip_model(tower_config(SIZES_OF, "mps.checkpoint", "clip"))
        with torch.device("meta"):
            cross = CrossModel(model.config.projection_dim)
        preprocess = ClipPreprocess(model.config.vision_config.image_size)
        reward.tower = _BlankMps(model, cross, preprocess, dtype=options["dtype"])
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.tower.scale * self.tower.similarity(images, prompts)


class MpsTower(ClipTower):
    """A frozen CLIP whose picture tokens look at the words of the prompt before they become an embedding.

    Args:
        cross: The network by which they do so.
    """

    def __init__(self, model, cross: CrossModel, preprocess, tokenizer=None, dtype: str = "float32"):
        super().__init__(model, preprocess, tokenizer, dtype)
        self.cross = cross.to(self.dtype).requires_grad_(False).eval()

    def similarity(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the cosine [B] in [-1, 1] between each picture, as its prompt sees it, and the prompt."""
        words, ends = self.read([*prompts, CONDITION])
        words, condition, texts = words[:-1], words[-1], ends[:-1]
        # The published code skips the norm after the tower.
        tokens = self.model.vision_model(pixel_values=self.preprocess(images).to(self.dtype)).last_hidden_state
        tokens = self.cross(self.model.visual_projection(tokens), words, words_that_matter(words, condition))
        return (F.normalize(tokens[:, 0].float(), dim=-1) * F.normalize(texts.float(), dim=-1)).sum(dim=-1)

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the projected states [B, L, D] of all words, and those of the end tokens [B, D]."""
        device = next(self.model.parameters()).device
        states = self.model.text_model(input_ids=self.tokenize(prompts).to(device))
        return self.model.text_projection(states.last_hidden_state), self.model.text_projection(states.pooler_output)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Returns token ids [B, L] int64, padded to the text tower's length (77). The padding counts as words."""
        length = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(prompts), padding="max_length", padding_side="right", truncation=True, max_length=length,
            return_tensors="pt",
        ).input_ids  # fmt: skip


class _BlankMps(BlankTokens, MpsTower):
    pass


@torch.no_grad()
def words_that_matter(words: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Returns which words are about the condition, [B, L] bool.

    Args:
        words: The states [B, L, D] of prompts.
        condition: The states [K, D] of the condition. A word is as much like it as like its most alike word.
    """
    likeness = (words.float() @ condition.float().T).amax(dim=-1)
    return likeness / likeness.amax(dim=-1, keepdim=True) > THRESHOLD


def load_networks(weights: Mapping[str, torch.Tensor], source: str) -> tuple:
    """Builds (CLIPModel, CrossModel) from a checkpoint.

    Raises:
        RewardError: A weight is missing, unknown or of another shape.
    """
    clip, cross = {}, {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        if part not in ("model", "cross_model"):
            raise RewardError(f"{source} is not in {LAYOUT} layout: unknown {name!r}")
        if UNUSED.fullmatch(name):
            continue
        if part == "model":
            clip[rest] = weight
        else:
            cross[next((re.sub(old, new, name) for old, new in RENAMES if re.match(old, name)), name)] = weight
    model = load_vit_h(clip, source, LAYOUT)
    width = model.config.projection_dim
    if width % HEAD_WIDTH:
        raise RewardError(f"{source}: embeddings of {width} numbers do not divide into heads of {HEAD_WIDTH}")
    with torch.device("meta"):
        check_weights(cross, CrossModel(width), source, LAYOUT)
    network = CrossModel(width)
    network.load_state_dict(cross)
    return model, network
