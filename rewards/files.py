"""Finds and reads the files of reward models: configurations, tokenizers, and weights."""

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from rewards.errors import RewardError, first_line


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
