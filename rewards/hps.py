"""Human Preference Score v2 and v2.1 (arXiv 2306.09341): a CLIP ViT-H/14 fine-tuned on human choices."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError, first_line
from rewards.files import find_file, load_weights
from rewards.preprocess import PadPreprocess
from rewards.registry import Precision
from rewards.skeleton import blank, clip_tower
from rewards.towers import ClipTower, load_tokenizer
from rewards.vit_h import SIZES_OF, load_vit_h

CHECKPOINTS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

# open_clip's names, and transformers' names for the same weights. The first match wins.
RENAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)
LAYER_RENAMES = (
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


class HPSReward(Reward):
    """Cosine of image and prompt under HPSv2, in [-1, 1]; about 0.2 to 0.35 for a picture of its prompt.

    It is the score of the hpsv2 package, made differentiable. The package's tables show it times 100.

    Args:
        version: The version of the checkpoint. The two have different scales.
        checkpoint: A local file. None: the version's file in checkpoint_repo.
        checkpoint_repo: The hub name or folder of the checkpoints.
        checkpoint_revision: The branch, tag or commit of the hub's repository. None: the newest.
        tokenizer: The hub name or folder with CLIP's vocabulary of 49408 tokens, such as the `tokenizer` folder of
            Stable Diffusion 1.x. The backend 'hpsv2' does not use it.
        backend: What runs the towers: transformers, or the hpsv2 package, where it is installed.
        dtype: The precision of the towers. A lower one disturbs the gradient.

    Raises:
        RewardError: A file is missing or does not fit.
    """

    plannable = True

    def __init__(
        self,
        version: Literal["v2.0", "v2.1"] = "v2.1",
        checkpoint: str | None = None,
        checkpoint_repo: str = "xswu/HPSv2",
        checkpoint_revision: str | None = None,
        tokenizer: str = "openai/clip-vit-large-patch14",
        backend: Literal["transformers", "hpsv2"] = "transformers",
        dtype: Precision = "float32",
    ):
        super().__init__()
        path = checkpoint or find_file(
            checkpoint_repo, CHECKPOINTS[version], checkpoint_revision, "hps.checkpoint=None, hps.checkpoint_repo"
        )
        weights = load_weights(path, "hps.checkpoint")
        weights = weights.get("state_dict", weights)
        self.tower = BACKENDS[backend](weights, tokenizer, dtype, source=f"hps.checkpoint={str(path)!r}")

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        reward = blank(cls)
        config = tower_config(SIZES_OF, "hps.checkpoint", "clip")
        reward.tower = clip_tower(config, options["dtype"], PadPreprocess)
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.tower.similarity(images, prompts)


class TransformersTower(ClipTower):
    """The towers of a checkpoint that is converted to a `transformers.CLIPModel`."""

    def __init__(self, weights: Mapping[str, torch.Tensor], tokenizer: str, dtype: str, source: str):
        model = load_vit_h(convert_open_clip(weights), source, "open_clip's ViT-H-14")
        preprocess = PadPreprocess(model.config.vision_config.image_size)
        words = load_tokenizer(tokenizer, None, model.config.text_config, "hps.tokenizer")
        super().__init__(model, preprocess, words, dtype)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Returns token ids [B, 77] int64 as open_clip makes them: text repaired, cut to length, padded with zeros."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, ids in zip(
            tokens, self.tokenizer(list(map(clean, prompts)), truncation=True, max_length=length).input_ids, strict=True
        ):
            row[: len(ids)] = torch.tensor(ids)
        return tokens


class HpsPackageTower(ClipTower):
    """The same towers, built by the hpsv2 package with its own copy of open_clip."""

    def __init__(self, weights: Mapping[str, torch.Tensor], tokenizer: str, dtype: str, source: str):
        try:
            from hpsv2.src.open_clip import create_model, get_tokenizer
        except Exception as error:
            # A torchvision built for another torch raises RuntimeError, and a missing package raises ImportError.
            raise RewardError(
                f"hps.backend='hpsv2': the package does not import ({first_line(error)}); "
                "see scripts/install_hps.sh, or use hps.backend='transformers'"
            ) from error
        model = create_model("ViT-H-14", precision="fp32", output_dict=True)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise RewardError(f"{source} does not fit open_clip's ViT-H-14: {first_line(error)}") from error
        super().__init__(model, PadPreprocess(model.visual.image_size[0]), get_tokenizer("ViT-H-14"), dtype)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels)

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(tokens)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        return self.tokenizer(list(prompts))


BACKENDS = {"transformers": TransformersTower, "hpsv2": HpsPackageTower}


def clean(prompt: str) -> str:
    """Repairs a prompt (mojibake, curly quotes, HTML entities) as open_clip does; transformers' tokenizer does not."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip().lower()


def convert_open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts open_clip's names and layouts to those of transformers' CLIPModel. Unknown names are kept."""
    converted = {}
    for name, weight in weights.items():
        new = next((re.sub(old, new, name) for old, new in RENAMES if re.match(old, name)), name)
        for old, replacement in LAYER_RENAMES:
            new = new.replace(old, replacement)
        if new in ("visual_projection.weight", "text_projection.weight"):
            # open_clip multiplies by this matrix from the right, a Linear from the left.
            converted[new] = weight.T.contiguous()
        elif ".attn.in_proj_" in new:
            for part, third in zip("qkv", weight.chunk(3), strict=True):
                converted[new.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = third.contiguous()
        else:
            converted[new] = weight
    return converted
