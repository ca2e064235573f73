"""A LoRA on the Hugging Face hub, as a local file."""

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
    """Whether it may be "user/name" or "user/name/folder/file.safetensors" of the hub."""
    return bool(_NAME.fullmatch(text))


def fetch_lora(name: str, field: str) -> Path:
    """Downloads a LoRA, unless the cache has it.

    Args:
        name: "user/name", or a file in it as "user/name/folder/file.safetensors".
        field: what named it, for the error message.

    Returns:
        The file in the hub's cache; peft's settings, where it has them, are beside it.

    Raises:
        ConfigError: there is no such path and no such LoRA on the hub, the hub cannot be reached, or one of several
            files has to be named.
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
    except Exception as error:  # the hub's client fails in many ways
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"{field} = {name!r} does not exist here, and is no LoRA that the hub gives ({type(error).__name__}: "
            f"{reason}); give a LoRA file, a checkpoint or a run folder"
        ) from error


def _only_lora(repo: str, name: str, field: str) -> str:
    """The file of a repository that is its LoRA: one of the usual names, or the only one there is."""
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
