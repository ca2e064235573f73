"""Frozen image and text towers, shared by all rewards that have some: finds their files, loads them, embeds."""

import json
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from rewards.base import did_you_mean
from rewards.errors import RewardError
from rewards.preprocess import ClipPreprocess

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageTower(nn.Module):
    """A frozen network that embeds images on the unit sphere. Subclasses implement `image_features`.

    Args:
        dtype: The precision of the network, a key of DTYPES. Pixels are prepared and embeddings normalised in float32.

    Raises:
        RewardError: The dtype is unknown.
    """

    def __init__(self, model: nn.Module, preprocess: ClipPreprocess, dtype: str = "float32"):
        super().__init__()
        self.dtype = dtype_of(dtype)
        self.model = model.to(self.dtype).requires_grad_(False).eval()
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


def dtype_of(name: str) -> torch.dtype:
    """Returns the torch dtype of a key of DTYPES. Raises a RewardError for any other name."""
    if name not in DTYPES:
        hint = did_you_mean(name, DTYPES)
        raise RewardError(f"dtype={name!r} is not known; allowed: {', '.join(DTYPES)}{hint}")
    return DTYPES[name]


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


def model_type(name: str, revision: str | None, field: str) -> str | None:
    """Returns the model type in the config.json of a hub name or folder. Raises a RewardError if it is not readable."""
    return read_config(name, revision, field).get("model_type")


def read_config(name: str, revision: str | None, field: str) -> dict:
    """Returns the config.json of a hub name or folder. Raises a RewardError if it is missing or damaged."""
    text = find_file(name, "config.json", revision, field).read_text()
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise RewardError(f"{field}={name!r}: its config.json is damaged: {first_line(error)}") from error


def load_whole(loader, name: str, revision: str | None, kind: str, field: str, **options):
    """Calls `loader.from_pretrained` with the options, and checks that the file has every weight of the model.

    Raises:
        RewardError: The model cannot be loaded or lacks weights. The message names `kind`.
    """
    try:
        model, loaded = loader.from_pretrained(name, revision=revision or "main", output_loading_info=True, **options)
    except Exception as error:  # damaged files, and pickles that are not plain weights, fail in many ways
        raise RewardError(f"{field}={name!r} cannot be loaded as a {kind} model: {first_line(error)}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise RewardError(f"{field}={name!r} lacks {len(missing)} weights of a {kind} model, such as {missing[0]}")
    return model


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


def read_tokenizer(loader, name: str, revision: str | None, kind: str, field: str):
    """Calls `loader.from_pretrained` for a hub name or folder. Raises a RewardError that names `kind` if it fails."""
    name = os.path.expanduser(name)
    find_file(name, "tokenizer_config.json", revision, field)
    try:
        return loader.from_pretrained(name, revision=revision or "main")
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise RewardError(f"{field}={name!r} holds no usable {kind} tokenizer: {first_line(error)}") from error


def find_file(name: str, filename: str, revision: str | None, field: str) -> Path:
    """Returns the local path of `filename` in a folder or a hub repository (from the cache, or downloaded).

    Raises:
        RewardError: The file is not found. The message says what was tried.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if (Path(folder) / filename).is_file():
            return Path(folder) / filename
        raise RewardError(f"{field}={name!r}: the folder has no {filename}")
    try:
        try:  # the cache comes first, so that a run with cached files needs no network
            return Path(hf_hub_download(name, filename, revision=revision or None, local_files_only=True))
        except OSError:
            # Without a network this fails at once, whereas the download tries for minutes.
            get_hf_file_metadata(hf_hub_url(name, filename, revision=revision or None), timeout=10)
            return Path(hf_hub_download(name, filename, revision=revision or None))
    except Exception as error:  # the hub's client also lets its transport's exceptions through
        raise RewardError(
            f"{field}={name!r}: no such folder here, and {filename} is neither in the Hugging Face cache nor to be had "
            f"from the hub ({first_line(error)}); give a local folder, or set HF_HOME to a cache that has it"
        ) from error


def load_weights(path: str | Path, field: str) -> dict:
    """Returns the tensors of a torch or .safetensors file, on the CPU. It reads plain weights only, no pickled code.

    Raises:
        RewardError: The file is missing, damaged, or holds anything but plain data.
    """
    path = os.path.expanduser(str(path))
    if not os.path.isfile(path):
        raise RewardError(f"{field}={str(path)!r} does not exist or is not a file")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of pickles that it then refuses
            if path.endswith(".safetensors"):  # torch.load reads these files only since torch 2.13
                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RewardError(f"{field}={str(path)!r} is not a file of plain weights, so it was not loaded") from error
    except Exception as error:
        # Damaged files fail in many ways (zip, safetensors, end of file). The file is at fault in all of them.
        raise RewardError(f"{field}={str(path)!r} cannot be read: {first_line(error)}") from error
    if not isinstance(weights, dict):
        raise RewardError(f"{field}={str(path)!r} holds a {type(weights).__name__}, expected a dict of weights")
    return weights


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_weights(weights: Mapping[str, torch.Tensor], model: nn.Module, source: str, layout: str) -> None:
    """Raises a RewardError if a converted checkpoint has a weight too many, too few or of another shape.

    Args:
        model: A model with the expected weights, on any device.
        source: The checkpoint to name in an error.
        layout: The layout to name in an error.
    """
    expected = model.state_dict()
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        raise RewardError(f"{source} is not in {layout} layout: missing {missing[:2]}, unknown {unknown[:2]}")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise RewardError(f"{source}: {name} has shape {list(weight.shape)}, expected {list(expected[name].shape)}")


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
