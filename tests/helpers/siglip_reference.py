"""Runs transformers' SiglipTokenizer: `python -m tests.helpers.siglip_reference PACKAGES FOLDER`.

PACKAGES holds REQUIREMENTS. FOLDER holds request.json with prompts; a spiece.model is trained on them, and written
beside it with the tokens.
"""

import json
import sys
from pathlib import Path

import torch

REQUIREMENTS = ("sentencepiece==0.2.3",)


def train(prompts, path):
    """A unigram model with the character map (NFKC) and the special tokens of the released one."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts * 50), model_prefix=str(path.with_suffix("")), model_type="unigram",
        vocab_size=200, hard_vocab_limit=False, pad_id=-1, bos_id=-1, eos_id=1, unk_id=2, control_symbols=["<pad>"],
        minloglevel=2,
    )  # fmt: skip


def main(packages, folder):
    sys.path.insert(0, packages)
    from transformers import SiglipTokenizer

    folder = Path(folder)
    request = json.loads((folder / "request.json").read_text())
    train([prompt.lower() for prompt in request["prompts"]], folder / "spiece.model")
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"))
    options = {"padding": "max_length", "truncation": True, "max_length": 64, "return_tensors": "pt"}
    tokens = tokenizer(request["prompts"] + request["texts"], **options).input_ids
    torch.save({"tokens": tokens}, folder / "answers.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
