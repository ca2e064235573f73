"""Small files in the formats that `imagereward` and `cyclereward` read: a BERT vocabulary and a checkpoint."""

import json
import string
from pathlib import Path

import torch

CYCLE = (0, 2, 4, 6, 8)  # where the linear layers of CycleReward's head are


def make_bert_tokenizer(folder):
    """A vocabulary in the files of uncased BERT: characters and a few words. Returns how many tokens it has."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation, "é", "猫"]
    words = ["red", "cat", "two", "dog", "sofa", "long", "very", "pepper", "##ing", "##st"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def imagereward_state(
    vocab,
    vision=128,
    text=64,
    depths=(2, 2),
    mlps=(256, 128),
    positions=64,
    image_size=224,
    patch=16,
    head_at=(0, 2, 4, 6, 7),
) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of ImageReward.pt, and with head_at = CYCLE of CycleReward's files.

    vocab: tokens with [DEC] and [ENC].
    """
    generator = torch.Generator().manual_seed(5)

    def linear(name, outputs, inputs):
        return {
            f"{name}.weight": torch.randn(outputs, inputs, generator=generator) * inputs**-0.5,
            f"{name}.bias": torch.randn(outputs, generator=generator) * 0.1,
        }

    def norm(name, width):
        weight, bias = (0.1 * torch.randn(width, generator=generator) for _ in range(2))
        return {f"{name}.weight": 1 + weight, f"{name}.bias": bias}

    image, words = "blip.visual_encoder", "blip.text_encoder"

    def small(*shape):
        """So small that the epsilon of the norm after it shows in the scores."""
        return torch.randn(*shape, generator=generator) * 0.02

    state = {
        f"{image}.cls_token": small(1, 1, vision),
        f"{image}.pos_embed": small(1, (image_size // patch) ** 2 + 1, vision),
        f"{image}.patch_embed.proj.weight": small(vision, 3, patch, patch) / patch,
        f"{image}.patch_embed.proj.bias": small(vision),
        **norm(f"{image}.norm", vision),
        f"{words}.embeddings.position_ids": torch.arange(positions).unsqueeze(0),
        f"{words}.embeddings.word_embeddings.weight": small(vocab, text),
        f"{words}.embeddings.position_embeddings.weight": small(positions, text),
        **norm(f"{words}.embeddings.LayerNorm", text),
        **linear("blip.vision_proj", 256, vision),
        **linear("blip.text_proj", 256, text),
    }
    for i in range(depths[0]):
        block = f"{image}.blocks.{i}"
        state |= norm(f"{block}.norm1", vision) | norm(f"{block}.norm2", vision)
        state |= linear(f"{block}.attn.qkv", 3 * vision, vision) | linear(f"{block}.attn.proj", vision, vision)
        state |= linear(f"{block}.mlp.fc1", mlps[0], vision) | linear(f"{block}.mlp.fc2", vision, mlps[0])
    for i in range(depths[1]):
        layer = f"{words}.encoder.layer.{i}"
        for attention, width in (("attention", text), ("crossattention", vision)):
            state |= linear(f"{layer}.{attention}.self.query", text, text)
            state |= linear(f"{layer}.{attention}.self.key", text, width)
            state |= linear(f"{layer}.{attention}.self.value", text, width)
            state |= linear(f"{layer}.{attention}.output.dense", text, text)
            state |= norm(f"{layer}.{attention}.output.LayerNorm", text)
        state |= linear(f"{layer}.intermediate.dense", mlps[1], text)
        state |= linear(f"{layer}.output.dense", text, mlps[1]) | norm(f"{layer}.output.LayerNorm", text)
    widths = (text, 1024, 128, 64, 16, 1)
    for i, before, after in zip(head_at, widths, widths[1:], strict=False):
        state |= linear(f"mlp.layers.{i}", after, before)
    return state
