"""What the families share of text: prompts are encoded one by one and remembered; the branches of guidance."""

import os
import sys
import textwrap

import torch
from tqdm.auto import tqdm

from alignprop.models.base import Conditioning

NEGATIVE = "negative_"  # what the unconditional branch has instead, by diffusers' names


class TextConditioned:
    """The part of the Model protocol (models/base.py) that is about prompts, over a diffusers pipeline.

    Attributes:
        pipeline: with its tokenizers and text encoders.
        text_encoders, lora_encoders, device: as the protocol says.
        guides: whether there is an unconditional branch.
    """

    guides = True

    def __init__(self):
        self._remembered: dict[str, Conditioning] = {}
        self._warned = False

    def encode(self, prompts: list[str]) -> Conditioning:
        """The conditioning of B prompts, without what is negative; calls the text encoders."""
        raise NotImplementedError

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """What the other branch of guidance has instead, from the conditioning of one empty prompt."""
        return empty

    def reader(self) -> tuple:
        """The tokenizer that reads the most of a prompt, and how many tokens that is."""
        return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length

    def chat_reader(self, limit: int, **template) -> tuple:
        """`reader` of a language model, whose tokens are also those of the chat around the prompt."""
        tokenizer = self.pipeline.tokenizer
        empty = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, **template
        )
        return tokenizer, limit - len(tokenizer(empty).input_ids)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Each distinct prompt is encoded once, while no text encoder has an adapter; of long ones, the end is lost."""
        wanted = [*prompts, ""] if self.guides else prompts
        known = {} if self._adapted else self._remembered
        if new := [p for p in dict.fromkeys(wanted) if p not in known]:
            self._warn_of_truncation(new)
            # One by one: how it is rounded must not depend on the prompts that happen to come with it. On the host:
            # thousands would not fit beside the model.
            for prompt in new:
                known[prompt] = {name: tensor[0].cpu() for name, tensor in self.encode([prompt]).items()}
        cond = self._gather([known[p] for p in prompts])
        if self.guides:
            empty = {name: tensor[None] for name, tensor in known[""].items()}
            instead = {name: tensor[0] for name, tensor in self.unconditional(empty).items()}
            cond |= {NEGATIVE + name: tensor for name, tensor in self._gather([instead] * len(prompts)).items()}
        return cond

    def backward_prompts(self, prompts: list[str], gradients: Conditioning) -> None:
        """One by one again, and encoded again: no more is held than the graphs of one prompt and of an empty one."""
        needs_empty = self.guides and any(g.any() for name, g in gradients.items() if name.startswith(NEGATIVE))
        for row, prompt in enumerate(prompts):
            with torch.enable_grad():
                cond = self.encode([prompt])
                if needs_empty:
                    instead = self.unconditional(self.encode([""]))
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
        wanted = (*prompts, *([""] if self.guides else []))
        return not self._adapted and all(prompt in self._remembered for prompt in wanted)

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        conditional = {name: tensor for name, tensor in cond.items() if not name.startswith(NEGATIVE)}
        if guidance_scale == 1:
            return [conditional]
        instead = {name.removeprefix(NEGATIVE): tensor for name, tensor in cond.items() if name.startswith(NEGATIVE)}
        return [conditional | instead, conditional]

    def _warn_of_truncation(self, prompts: list[str]) -> None:
        """Once for all prompts, not for each."""
        tokenizer, limit = self.reader()
        counts = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids]
        longest = max(counts)
        if longest <= limit or self._warned or os.environ.get("RANK", "0") != "0":
            return
        self._warned = True
        shown = textwrap.shorten(prompts[counts.index(longest)], 60, placeholder=" …")
        # The tokens that mark beginning and end are nothing that a person wrote.
        marks = len(tokenizer("").input_ids)
        tqdm.write(
            f"warning: prompts are truncated to {limit - marks} tokens, and {shown!r} has {longest - marks}; it loses "
            "its end, and so do others as long",
            file=sys.stderr,
        )

    def _zeros(self, *shape: int) -> torch.Tensor:
        """In the precision of the text encoders, where the model is."""
        return torch.zeros(shape, dtype=self.text_encoders[0].dtype, device=self.device)
