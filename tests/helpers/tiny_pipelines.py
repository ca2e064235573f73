"""Random-weight pipelines of every family, in the folder format of the released models, tokenizers included."""

from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel

from alignprop.models import FAMILIES
from alignprop.models.base import ENCODERS
from alignprop.models.skeleton import build_module
from tests.helpers.single_file import WORDS, write_tokenizer
from tests.helpers.tiny_families import TINY

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def make_family(folder, family: str, seed: int = 0, **pipeline_options) -> Path:
    """Writes a pipeline of TINY[family] to `folder`, with other weights for every seed.

    Args:
        pipeline_options: what the pipeline class is told besides its parts.
    """
    folder, facts = Path(folder), TINY[family]
    parts = {"vae": facts["vae"], **dict(zip(ENCODERS, facts["text_encoders"], strict=False))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {name: build_module(part, torch.float32, "cpu") for name, part in parts.items()}
        denoiser = build_module(facts["denoiser"], torch.float32, "cpu")
        _spread(denoiser)
        if hasattr(modules["vae"], "bn"):
            modules["vae"].bn.running_mean.normal_()
            modules["vae"].bn.running_var.uniform_(0.5, 2)
    kind = "unet" if isinstance(denoiser, diffusers.UNet2DConditionModel) else "transformer"
    scheduler = {k: v for k, v in facts["scheduler"].items() if k != "_class_name"}
    flow = facts["scheduler"]["_class_name"].startswith("Flow")
    scheduler = (FlowMatchEulerDiscreteScheduler if flow else DDIMScheduler)(**scheduler)
    tokenizers = {
        f"tokenizer{name.removeprefix('text_encoder')}": make_tokenizer(type(module).__name__, folder / "words")
        for name, module in modules.items() if name != "vae"
    }  # fmt: skip
    options = {**facts.get("pipeline", {}), **pipeline_options}
    cls = getattr(diffusers, FAMILIES[family].pipeline)
    unused = dict.fromkeys(FAMILIES[family].model_class.unused)
    cls(**modules, **tokenizers, **{kind: denoiser}, scheduler=scheduler, **options, **unused).save_pretrained(folder)
    return folder


def _spread(denoiser) -> None:
    """Layers that start at zero would make a random network's output zero, and with it every gradient."""
    for parameter in denoiser.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def make_tokenizer(encoder: str, folder: Path):
    """Of the kind that the encoder's class goes with, knowing WORDS."""
    if encoder.startswith("CLIP"):
        write_tokenizer(folder)
        return transformers.CLIPTokenizer.from_pretrained(folder)
    if encoder.startswith("T5"):
        return transformers.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_pieces()], extra_ids=0)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    vocabulary = {name: i for i, name in enumerate(names)}
    return transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], chat_template=CHAT, additional_special_tokens=names[1:3]
    )


def _pieces() -> list[tuple[str, float]]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    return [(f"▁{word}", -1.0) for word in WORDS] + [(piece, -5.0) for piece in ("▁", *letters)]
