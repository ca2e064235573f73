"""Human Preference Score v3 (arXiv 2508.03789): a Qwen2-VL of 7 billion weights, fine-tuned on human choices."""

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from rewards.base import Reward, TowerConfig
from rewards.errors import RewardError
from rewards.files import check_weights, find_file, load_weights
from rewards.hpsv3_prompt import REWARD_TOKEN
from rewards.hpsv3_tower import BlankTower, HPSv3Tower, TextRotary, VisionRotary
from rewards.qwen_vl import load_qwen_tokenizer
from rewards.registry import Precision
from rewards.skeleton import blank
from rewards.towers import DTYPES

FILE = "HPSv3.safetensors"
SIZES_OF = "MizzenAI/HPSv3"  # the sizes of this model are bundled

# The widths of the attention heads in Qwen2-VL's two halves. The shapes in a checkpoint do not tell them.
VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH = 80, 128
HEAD_WIDTHS = (1024, 16, 2)  # The second output is the logarithm of a standard deviation. It is not part of the score.


class HPSv3Reward(Reward):
    """How much people prefer the picture for its prompt; no bounds, mostly between -5 and 15.

    It is the score of the hpsv3 package, made differentiable: the mean of the distribution that the model predicts.

    Args:
        checkpoint: A local HPSv3.safetensors. None: the file of that name in checkpoint_repo.
        checkpoint_repo: The hub name or folder of the checkpoint.
        checkpoint_revision: The branch, tag or commit of the hub's repository. None: the newest.
        tokenizer: The hub name or folder with the vocabulary of Qwen2-VL.
        dtype: The precision of the model, which was trained in bfloat16; the head runs in float32.

    Raises:
        RewardError: A file is missing or does not fit, or a picture is too narrow.
    """

    plannable = True

    def __init__(
        self,
        checkpoint: str | None = None,
        checkpoint_repo: str = "MizzenAI/HPSv3",
        checkpoint_revision: str | None = None,
        tokenizer: str = "Qwen/Qwen2-VL-7B-Instruct",
        dtype: Precision = "bfloat16",
    ):
        super().__init__()
        where = "hpsv3.checkpoint=None, hpsv3.checkpoint_repo"
        path = checkpoint or find_file(checkpoint_repo, FILE, checkpoint_revision, where)
        source = f"hpsv3.checkpoint={str(path)!r}"
        weights = load_weights(path, "hpsv3.checkpoint")
        self.tower, self.head = load_hpsv3(weights.get("model", weights), tokenizer, dtype, source)

    @classmethod
    def skeleton(cls, options: Mapping, tower_config: TowerConfig) -> Reward:
        from transformers import Qwen2VLConfig

        reward = blank(cls)
        config = Qwen2VLConfig(**copy.deepcopy(tower_config(SIZES_OF, "hpsv3.checkpoint", "qwen2_vl")))
        model, reward.head = build(config)
        reward.tower = BlankTower(model, dtype=options["dtype"])
        return reward

    def score(self, images: torch.Tensor, prompts: list[str], metadata: Sequence[dict] | None) -> torch.Tensor:
        return self.head(self.tower(images, prompts).float())[:, 0]


def build(config) -> tuple[nn.Module, nn.Sequential]:
    """Returns (Qwen2VLModel, head) of a Qwen2VLConfig, without weights, and frozen."""
    from transformers import Qwen2VLModel

    vision, text = config.vision_config, config.text_config
    widths = (text.hidden_size, *HEAD_WIDTHS)
    with torch.device("meta"):
        model = Qwen2VLModel(config)
        first, second, last = (nn.Linear(*pair) for pair in pairwise(widths))
    model.visual.rotary_pos_emb = VisionRotary(vision.embed_dim // vision.num_heads // 2, 10000.0)
    model.language_model.rotary_emb = TextRotary(text.hidden_size // text.num_attention_heads, 1e6)
    # The places of the layers are part of the file format ("rm_head.3.weight").
    head = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), second, nn.ReLU(), last)
    return model, head.requires_grad_(False).eval()


def load_hpsv3(weights: Mapping, tokenizer: str, dtype: str, source: str) -> tuple[HPSv3Tower, nn.Sequential]:
    """Builds (tower, head), of any size, from the weights of a checkpoint.

    Raises:
        RewardError: There are too many or too few weights, or they have other shapes, or the tokenizer does not fit.
    """
    config = config_of(weights, source)
    model, head = build(config)
    parts = nn.ModuleDict({"visual": model.visual, "model": model.language_model, "rm_head": head})
    used = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}  # for text, not for scores
    check_weights(used, parts, source, "HPSv3's")
    words = load_tokenizer(tokenizer, config.text_config.vocab_size)
    tower_dtype = DTYPES[dtype]
    cast = {name: weight.to(torch.float if "rm_head." in name else tower_dtype) for name, weight in used.items()}
    parts.load_state_dict(cast, assign=True)
    return HPSv3Tower(model, words, dtype), head


def config_of(weights: Mapping[str, torch.Tensor], source: str):
    """Returns the Qwen2VLConfig of the weights. Raises a RewardError for another layout."""
    from transformers import Qwen2VLConfig

    try:
        vision_width = len(weights["visual.patch_embed.proj.weight"])
        vision_mlp = len(weights["visual.blocks.0.mlp.fc1.bias"])
        vocabulary, width = weights["model.embed_tokens.weight"].shape
        pairs = len(weights["model.layers.0.self_attn.k_proj.bias"])
        mlp = len(weights["model.layers.0.mlp.gate_proj.weight"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RewardError(f"{source} is not in HPSv3's layout: no usable {error}") from error
    if vision_width % VISION_HEAD_WIDTH or width % TEXT_HEAD_WIDTH or pairs % TEXT_HEAD_WIDTH:
        raise RewardError(
            f"{source}: widths of {vision_width}, {width} and {pairs} are not Qwen2-VL's, whose attention heads are "
            f"{VISION_HEAD_WIDTH} wide for pictures and {TEXT_HEAD_WIDTH} for text"
        )
    return Qwen2VLConfig(
        vision_config=dict(
            embed_dim=vision_width, hidden_size=width, num_heads=vision_width // VISION_HEAD_WIDTH,
            mlp_ratio=vision_mlp // vision_width, depth=_depth(weights, "visual.blocks"),
        ),
        text_config=dict(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, rms_norm_eps=1e-6,
            num_hidden_layers=_depth(weights, "model.layers"), num_attention_heads=width // TEXT_HEAD_WIDTH,
            num_key_value_heads=pairs // TEXT_HEAD_WIDTH,
        ),
    )  # fmt: skip


def _depth(weights: Mapping[str, torch.Tensor], layers: str) -> int:
    return len({match[1] for name in weights if (match := re.match(rf"{layers}\.(\d+)\.", name))})


def load_tokenizer(name: str, vocabulary: int):
    """Loads Qwen2-VL's tokenizer and adds the reward token at the end of its vocabulary.

    Raises:
        RewardError: It cannot be loaded, or does not have `vocabulary` tokens.
    """
    from transformers import AddedToken

    tokenizer = load_qwen_tokenizer(name, None, "hpsv3.tokenizer")
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True)], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise RewardError(
            f"hpsv3.tokenizer={name!r}: its {len(tokenizer)} tokens, with the reward token, do not fit the "
            f"checkpoint's {vocabulary}"
        )
    return tokenizer
