"""Frozen image and text towers, which many rewards share: how they are loaded, and how they embed."""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rewards.errors import RewardError
from rewards.files import find_file, load_whole, model_type, read_tokenizer
from rewards.preprocess import ClipPreprocess

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageTower(nn.Module):
    """A frozen network that embeds images on the unit sphere. Subclasses implement `image_features`.

    Args:
        dtype: The precision of the network, a key of DTYPES. Pixels are prepared and embeddings normalised in float32.
    """

    def __init__(self, model: nn.Module, preprocess: ClipPreprocess, dtype: str = "float32"):
        super().__init__()
        self.dtype = DTYPES[dtype]
        for weight in model.parameters():  # but not the buffers, such as the frequencies of rotary positions
            weight.data = weight.data.to(self.dtype)
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns unit vectors [B, D] float32 of images [B, 3, H, W] in [0, 1]; differentiable."""
        return F.normalize(self.image_features(self.preprocess(images).to(self.dtype)).float(), dim=-1)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns vectors [B, D] of any length, given the preprocessed pixels."""
        raise NotImplementedError


class ClipTower(ImageTower):
    """A frozen `transformers.CLIPModel` that embeds images and prompts on the unit sphere.

    Args:
        model: A CLIPModel. Its text half may be missing if `tokenizer` is None.
    """

    def __init__(self, model: nn.Module, preprocess: ClipPreprocess, tokenizer=None, dtype: str = "float32"):
        # The model multiplies a cosine by this. It is computed before the cast, because bfloat16 turns 100 into 98.9.
        scale = model.logit_scale.detach().float().exp()
        super().__init__(model, preprocess, dtype)
        self.register_buffer("scale", scale, persistent=False)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Returns unit vectors [B, D] float32. Prompts are cut at the text tower's length (77 tokens for CLIP)."""
        device = next(self.model.parameters()).device
        return F.normalize(self.text_features(self.tokenize(prompts).to(device)).float(), dim=-1)

    def similarity(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the cosine [B] in [-1, 1] between each image and its prompt."""
        return (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=-1)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        # No attention mask is needed: the tower is causal and is read at the first end token, before any padding.
        return self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Returns token ids [B, L] int64, padded on the right."""
        length = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(prompts), padding=True, padding_side="right", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids


def load_clip(
    name: str,
    revision: str | None,
    dtype: str,
    with_text: bool,
    field: str,
    processor: tuple[str, str] | None = None,
    preprocess: type[ClipPreprocess] = ClipPreprocess,
) -> ClipTower:
    """Loads the CLIP `name`: a hub name ("openai/clip-vit-large-patch14") or a folder written by `save_pretrained`.

    Args:
        with_text: Load the tokenizer and the text tower as well.
        field: The option to name in an error.
        processor: (hub name or folder, option that names it) of the tokenizer and the preprocessor file. None: those of
            the model.
        preprocess: The class that prepares the pixels.

    Raises:
        RewardError: It cannot be found, is not a CLIP, lacks weights, or its tokenizer belongs to another model.
    """
    from transformers import CLIPModel

    name = os.path.expanduser(name)
    kind = model_type(name, revision, field)
    if kind != "clip":
        raise RewardError(f"{field}={name!r} is a {kind!r} model, expected 'clip' (both towers of a CLIPModel)")
    model = load_whole(CLIPModel, name, revision, "CLIP", field)
    files, files_field = processor or (name, field)
    files_revision = None if processor else revision
    size = model.config.vision_config.image_size
    prepared = load_preprocess(preprocess, files, files_revision, size, files_field)
    if with_text:
        tokenizer = load_tokenizer(files, files_revision, model.config.text_config, files_field)
        return ClipTower(model, prepared, tokenizer, dtype)
    del model.text_model, model.text_projection
    return ClipTower(model, prepared, dtype=dtype)


def load_tokenizer(name: str, revision: str | None, text_config, field: str):
    """Loads the CLIPTokenizer of a hub name or folder. Raises a RewardError if it does not fit the text tower."""
    from transformers import CLIPTokenizer

    tokenizer = read_tokenizer(CLIPTokenizer, name, revision, "CLIP", field)
    # If the files are missing, transformers makes an almost empty vocabulary. Older CLIP configs say eos_token_id=2 and
    # mean "the highest id".
    end = text_config.eos_token_id
    end = len(tokenizer) - 1 if end == 2 else end
    if tokenizer.eos_token_id != end or len(tokenizer) > text_config.vocab_size:
        raise RewardError(
            f"{field}={name!r}: its tokenizer ({len(tokenizer)} tokens, end token {tokenizer.eos_token_id}) does not "
            f"fit the text tower ({text_config.vocab_size} tokens, end token {end})"
        )
    return tokenizer


def load_preprocess(
    kind: type[ClipPreprocess], name: str, revision: str | None, size: int, field: str
) -> ClipPreprocess:
    """Builds a `kind` for pictures of `size` pixels a side, from the model's own file or else with its usual values.

    Raises:
        RewardError: The file is not supported.
    """
    # transformers 5 writes processor_config.json when it saves a whole processor.
    for filename in ("preprocessor_config.json", "processor_config.json"):
        try:
            path = find_file(name, filename, revision, field)
        except RewardError:
            continue
        return kind.from_json(path.read_text(), size, f"{field}={name!r}, {filename}")
    return kind(size)
