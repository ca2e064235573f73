"""Asks a vision-language model of transformers about a picture, and keeps answers in a folder."""

import copy
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewards.errors import RewardError, first_line
from rewards.files import load_whole, model_type
from rewards.towers import DTYPES


class LocalVlm(nn.Module):
    """A frozen image-text model of transformers with its processor. It answers one question after the other, greedily.

    Args:
        processor: None where only the model's memory is planned.
        max_tokens: The longest answer in tokens.
        identity: What an answer depends on besides the picture and the question.
    """

    at_once = 1  # questions at the same time

    def __init__(self, model: nn.Module, processor: Any, max_tokens: int, identity: tuple = ()):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.processor, self.max_tokens, self.identity = processor, max_tokens, identity

    @torch.no_grad()
    def answer(self, picture: Any, question: str) -> str:
        """Returns the model's answer to a question about a PIL picture."""
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        pixels = {name: value.to(self.model.dtype) for name, value in inputs.items() if value.is_floating_point()}
        greedy = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
        tokens = self.model.generate(**{**inputs, **pixels}, max_new_tokens=self.max_tokens, **greedy)
        return self.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load_vlm(name: str, revision: str | None, dtype: str, max_tokens: int, field: str) -> LocalVlm:
    """Loads an image-text model: a hub name ("Qwen/Qwen2.5-VL-7B-Instruct") or a folder written by `save_pretrained`.

    Raises:
        RewardError: It cannot be found or loaded, or is not an image-text model.
    """
    from transformers import AutoModelForImageTextToText

    name = os.path.expanduser(name)
    model_type(name, revision, field)
    precision = DTYPES[dtype]
    processor = _processor(name, revision, field)
    model = load_whole(AutoModelForImageTextToText, name, revision, "vision-language", field)
    return LocalVlm(model.to(precision), processor, max_tokens, (name, revision, dtype, max_tokens))


def plan_vlm(config: Mapping, dtype: str, max_tokens: int, source: str) -> LocalVlm:
    """Returns the model of a configuration on torch's meta device, without a processor, to plan its memory.

    Args:
        source: The option and model to name in an error.

    Raises:
        RewardError: It is not the configuration of an image-text model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**copy.deepcopy(dict(config))))
    except (TypeError, ValueError) as error:
        raise RewardError(f"{source} is no image-text model of transformers: {first_line(error)}") from error
    return LocalVlm(model.to(DTYPES[dtype]), None, max_tokens)


def _processor(name: str, revision: str | None, field: str):
    """Returns the processor of an image-text model. Without torchvision, which videos need, it takes no videos."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    where = dict(pretrained_model_name_or_path=name, revision=revision or "main")
    try:
        try:
            return AutoProcessor.from_pretrained(**where)
        except ImportError:
            kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(**where))]

        class WithoutVideos(kind):
            def check_argument_for_proper_class(self, argument_name, argument):
                if argument_name != "video_processor":
                    super().check_argument_for_proper_class(argument_name, argument)

        tokenizer = AutoTokenizer.from_pretrained(**where)
        images = AutoImageProcessor.from_pretrained(**where)
        return WithoutVideos(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)
    except Exception as error:  # files that are missing or damaged, and packages that are not installed
        raise RewardError(f"{field}={name!r} has no usable processor: {first_line(error)}") from error


class AnswerCache:
    """Answers in a folder, one file each, under the hash of the picture, the question and what else they depend on.

    Several processes can use a folder at the same time.

    Args:
        folder: None keeps nothing.
        field: The option to name in an error.

    Raises:
        RewardError: The folder cannot be made.
    """

    def __init__(self, folder: str | None, identity: tuple, field: str):
        self.folder, self.identity = folder and Path(folder).expanduser(), identity
        try:
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RewardError(f"{field}={folder!r} is no folder and cannot be made one: {first_line(error)}") from error

    def find(self, picture: Any, question: str) -> str | None:
        file = self._file(picture, question)
        return file.read_text(encoding="utf-8") if file and file.is_file() else None

    def keep(self, picture: Any, question: str, answer: str) -> None:
        if file := self._file(picture, question):
            part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            part.write_text(answer, encoding="utf-8")
            part.replace(file)

    def _file(self, picture: Any, question: str) -> Path | None:
        if self.folder is None:
            return None
        facts = json.dumps([*self.identity, question, *picture.size])
        return self.folder / f"{hashlib.sha256(facts.encode() + picture.tobytes()).hexdigest()}.txt"
