"""Small files in the formats of the released CLIP-FlanT5 and LLaVA-1.5, with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rewards.vqa_clip import AFTER, BEFORE
from tests.helpers.reward_files import make_clip, randomise

T5 = dict(
    vocab_size=190, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    is_encoder_decoder=True, dropout_rate=0.1,
)  # fmt: skip
PICTURES = dict(
    mm_hidden_size=32, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
    mm_use_im_start_end=False, mm_use_im_patch_token=False, use_mm_proj=True, image_aspect_ratio="pad",
)  # fmt: skip


def make_t5_tokenizer(folder, extra=20, yes="▁Yes") -> int:
    """A T5Tokenizer of the printable characters, with a few words. Returns its number of tokens."""
    from transformers import T5Tokenizer

    words = ["▁", *map(chr, range(33, 127)), yes, "▁Does", "▁figure", "▁show", "▁red", "▁cat", "no", "er", "an"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -3.0 - 0.01 * rank + 2 * len(word)) for rank, word in enumerate(words)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=extra)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_clip_t5(folder, model_type="clip_t5", layout="bin", **config) -> dict:
    """Writes a CLIP, a T5 tokenizer and a CLIP-FlanT5 in two shards. Returns options of `vqascore`.

    Args:
        layout: "bin" or "safetensors", the format of the shards.
    """
    folder = Path(folder)
    clip = make_clip(folder / "clip", image_size=56, patch_size=14, seed=5)
    make_t5_tokenizer(folder / "tokenizer")
    facts = {"model_type": model_type, "architectures": ["CLIPT5ForConditionalGeneration"], "torch_dtype": "float32"}
    facts |= T5 | PICTURES | {"mm_vision_tower": str(clip)} | config
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(facts))
    write_shards(model, clip_t5_state(load_file(clip / "model.safetensors")), layout)
    return {"model": str(model), "tokenizer": str(folder / "tokenizer"), "dtype": "float32"}


def clip_t5_state(clip: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random weights under the names that CLIP-FlanT5's training code saves, with a copy of the CLIP, as there."""
    from transformers import T5Config, T5ForConditionalGeneration

    state = randomise(T5ForConditionalGeneration(T5Config(**T5)), seed=6).state_dict()
    generator, width, seen = torch.Generator().manual_seed(6), T5["d_model"], PICTURES["mm_hidden_size"]
    # T5 does not divide queries by the root of their width. Its own first weights are that much smaller.
    state = {name: weight * (T5["d_kv"] ** -0.5 if ".q." in name else 1) for name, weight in state.items()}
    state["lm_head.weight"] = torch.randn(T5["vocab_size"], width, generator=generator) * width**-0.5
    for place, inputs in ((0, seen), (2, width)):
        state[f"mm_projector.{place}.weight"] = 2 * torch.randn(width, inputs, generator=generator) * inputs**-0.5
        state[f"mm_projector.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
    state["embed_tokens.weight"] = state["shared.weight"].clone()
    seen = {name: weight for name, weight in clip.items() if name.startswith("vision_model.")}
    state |= {f"vision_tower.vision_tower.{name}": weight for name, weight in seen.items()}
    return state


def make_llama_tokenizer(folder, extra=0, yes="Yes") -> int:
    """A LlamaTokenizer of all bytes, and of what is frequent in the question. Returns its number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    characters = ["▁", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=characters, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator([BEFORE, AFTER.strip(), f"{yes} " * 50], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_tokens(["<image>", "<pad>", *(f"<{i}>" for i in range(extra))], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_llava(folder, **config) -> dict:
    """Writes a LLaVA-1.5 under the names of llava-hf's files, with its tokenizer. Returns options of `vqascore`."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration

    folder = Path(folder) / "llava"
    tokens = make_llama_tokenizer(folder)
    text = dict(
        model_type="llama", vocab_size=tokens + 30, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_attention_heads=2,
        num_hidden_layers=2, image_size=56, patch_size=14, projection_dim=24,
    )  # fmt: skip
    ids = dict(image_token_index=tokens - 2, pad_token_id=tokens - 1, image_seq_length=16)
    config = LlavaConfig(text_config=text, vision_config=vision, **ids | config)
    model = randomise(LlavaForConditionalGeneration(config), seed=7)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in state.items()}
    (folder / "model.safetensors").unlink()
    write_shards(folder, state, "safetensors")
    sizes = dict(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25], **sizes).save_pretrained(folder)
    return {"model": str(folder), "dtype": "float32"}


def write_shards(folder: Path, state: dict[str, torch.Tensor], layout: str) -> None:
    """Writes the weights as two files with an index, as transformers does for large models."""
    stem, end = ("pytorch_model", "bin") if layout == "bin" else ("model", "safetensors")
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    where = {}
    for number, half in enumerate(halves, 1):
        file = f"{stem}-{number:05d}-of-00002.{end}"
        weights = {name: state[name] for name in half}
        torch.save(weights, folder / file) if layout == "bin" else save_file(weights, folder / file, {"format": "pt"})
        where |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": sum(4 * weight.numel() for weight in state.values())}, "weight_map": where}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
