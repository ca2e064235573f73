"""Downloads a LoRA from the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from alignprop.lora.files import LORA_FILE
from alignprop.lora.scales import PEFT_CONFIG, PEFT_FILE
from alignprop.models.loading import check_reachable
from alignprop.settings.errors import ConfigError

_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+\.safetensors))?")


def is_hub_name(text: str) -> bool:
    """Whether `text` may be a name on the hub: "user/name" or "user/name/folder/file.safetensors"."""
    return bool(_NAME.fullmatch(text))


def fetch_lora(name: str, field: str) -> Path:
    """Downloads a LoRA, unless the cache already has it.

    Args:
        name: "user/name", or a file of that repository as "user/name/folder/file.safetensors".
        field: the setting that names the LoRA, for error messages.

    Returns:
        The file in the hub's cache. If it is peft's `adapter_model.safetensors`, peft's settings are next to it.

    Raises:
        ConfigError: the hub has no such LoRA, it cannot be reached, or the repository has several files, so that one
            has to be named.
    """
    repo, file = _NAME.fullmatch(name).groups()
    try:
        file = file or _only_lora(repo, name, field)
        check_reachable(repo, None, file)
        if Path(file).name == PEFT_FILE:
            hf_hub_download(repo, str(Path(file).with_name(PEFT_CONFIG)))
        return Path(hf_hub_download(repo, file))
    except ConfigError:
        raise
    except Exception as error:  # The hub's client raises many kinds of errors.
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"{field} = {name!r} is no local file or folder, and could not be loaded from the hub "
            f"({type(error).__name__}: "
            f"{reason}); give a LoRA file, a checkpoint or a run folder"
        ) from error


def _only_lora(repo: str, name: str, field: str) -> str:
    """Returns the LoRA file of a repository: the one with a usual name, or else its only .safetensors file."""
    for usual in (LORA_FILE, PEFT_FILE):
        try:
            check_reachable(repo, None, usual)
            return usual
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    files = [file for file in HfApi().list_repo_files(repo) if file.endswith(".safetensors")]
    if len(files) != 1:
        which = f"several files, name one as '{repo}/{files[0]}': {', '.join(files)}" if files else "no LoRA"
        raise ConfigError(f"{field} = {name!r} is on the hub and has {which}")
    return files[0]
