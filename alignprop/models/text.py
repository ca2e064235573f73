"""The text code that all families share: it encodes and remembers prompts, and makes the branches of guidance."""

import os
import sys
import textwrap

import torch
from tqdm.auto import tqdm

from alignprop.models.base import Conditioning

NEGATIVE = "negative_"  # diffusers' prefix for the conditioning of the unconditional branch


class TextConditioned:
    """The part of the Model protocol (models/base.py) that handles prompts, over a diffusers pipeline.

    Attributes:
        pipeline: a pipeline with its tokenizers and text encoders.
        text_encoders, lora_encoders, device: the attributes of the protocol.
        guides: whether there is an unconditional branch.
        negative_prompt: the prompt of the unconditional branch; empty unless the user gives one.
        negatives: maps a prompt to a negative prompt of its own, which takes the place of `negative_prompt`.
    """

    guides, negative_prompt = True, ""

    def __init__(self):
        self.negatives: dict[str, str] = {}
        self._remembered: dict[str, Conditioning] = {}
        self._warned: list[str] = []  # shared with the same model for other sizes, like `_remembered`

    def encode(self, prompts: list[str]) -> Conditioning:
        """Calls the text encoders; returns the conditioning of B prompts, without the negative_… part."""
        raise NotImplementedError

    def unconditional(self, cond: Conditioning, negative_prompt: str) -> Conditioning:
        """Returns the tensors that only the unconditional branch has, from the conditioning of its prompt."""
        return cond

    def negative_of(self, prompt: str) -> str:
        return self.negatives.get(prompt, self.negative_prompt)

    def reader(self) -> tuple:
        """Returns the tokenizer that reads the longest part of a prompt, and the number of tokens that it reads."""
        return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length

    def chat_reader(self, limit: int, **template) -> tuple:
        """Returns the `reader` of a language model; the chat template around the prompt uses some of `limit` tokens."""
        tokenizer = self.pipeline.tokenizer
        empty = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, **template
        )
        return tokenizer, limit - len(tokenizer(empty).input_ids)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Returns the conditioning of B prompts. A long prompt is truncated, with a warning.

        Each distinct prompt is encoded once, unless a text encoder has an adapter.
        """
        negatives = [self.negative_of(p) for p in prompts] if self.guides else []
        wanted = [*prompts, *negatives]
        known = {} if self._adapted else self._remembered
        if new := [p for p in dict.fromkeys(wanted) if p not in known]:
            self._warn_of_truncation(new)
            # Prompts are encoded one by one, so that the rounding of one does not depend on the others in a batch.
            # They are stored on the host, because thousands do not fit on the device in addition to the model.
            for prompt in new:
                known[prompt] = {name: tensor[0].cpu() for name, tensor in self.encode([prompt]).items()}
        cond = self._gather([known[p] for p in prompts])
        if self.guides:
            instead = {p: self.unconditional(known[p], p) for p in set(negatives)}
            cond |= {NEGATIVE + name: t for name, t in self._gather([instead[p] for p in negatives]).items()}
        return cond

    def backward_prompts(self, prompts: list[str], gradients: Conditioning) -> None:
        """Adds ∂R/∂θ to the `.grad` of the trained parameters of the text encoders.

        Each prompt is encoded again, one by one, so that only its graph and the graph of the negative prompt are held.
        """
        needs_empty = self.guides and any(g.any() for name, g in gradients.items() if name.startswith(NEGATIVE))
        for row, prompt in enumerate(prompts):
            with torch.enable_grad():
                cond = self.encode([prompt])
                if needs_empty:
                    negative = self.negative_of(prompt)
                    instead = self.unconditional(self.encode([negative]), negative)
                    cond |= {NEGATIVE + name: tensor for name, tensor in instead.items()}
            names = [name for name, tensor in cond.items() if tensor.requires_grad and name in gradients]
            into = [gradients[name][row : row + 1].to(cond[name]) for name in names]
            torch.autograd.backward([cond[name] for name in names], into)

    @property
    def _adapted(self) -> bool:
        return any(getattr(encoder, "peft_config", None) for encoder in self.lora_encoders.values())

    def _gather(self, rows: list[Conditioning]) -> Conditioning:
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def knows(self, prompts: list[str]) -> bool:
        wanted = (*prompts, *(map(self.negative_of, prompts) if self.guides else ()))
        return not self._adapted and all(prompt in self._remembered for prompt in wanted)

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        conditional = {name: tensor for name, tensor in cond.items() if not name.startswith(NEGATIVE)}
        if guidance_scale == 1:
            return [conditional]
        instead = {name.removeprefix(NEGATIVE): tensor for name, tensor in cond.items() if name.startswith(NEGATIVE)}
        return [conditional | instead, conditional]

    def _warn_of_truncation(self, prompts: list[str]) -> None:
        """Warns only once, however many prompts are too long."""
        tokenizer, limit = self.reader()
        counts = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids]
        longest = max(counts)
        if longest <= limit or self._warned or os.environ.get("RANK", "0") != "0":
            return
        shown = textwrap.shorten(prompts[counts.index(longest)], 60, placeholder=" …")
        self._warned.append(shown)
        # The reported counts leave out the tokens that mark beginning and end, because the user did not write them.
        marks = len(tokenizer("").input_ids)
        tqdm.write(
            f"warning: prompts are truncated to {limit - marks} tokens, and {shown!r} has {longest - marks}; its end "
            "is ignored, and so is the end of every other prompt over the limit",
            file=sys.stderr,
        )

    def _zeros(self, *shape: int) -> torch.Tensor:
        """Returns zeros with the dtype of the text encoders, on the device of the model."""
        return torch.zeros(shape, dtype=self.text_encoders[0].dtype, device=self.device)
