"""Small files in the formats that the `hpsv3` reward reads: a Qwen2 tokenizer and a checkpoint."""

import json

import torch

from rewards.hpsv3_prompt import INSTRUCTION

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip


def make_qwen_tokenizer(folder) -> int:
    """A Qwen2Tokenizer of all bytes, and of what is frequent in the rewards' texts. Returns its number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet)
    trained.train_from_iterator([INSTRUCTION, "Yes " * 50], trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def hpsv3_state(
    vocabulary, vision=160, text=256, depths=(2, 2), mlps=(320, 128), pairs=128, head=(1024, 16, 2)
) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of HPSv3.safetensors; vocabulary: tokens with the reward token."""
    generator = torch.Generator().manual_seed(7)

    def matrix(*shape):
        return torch.randn(*shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5

    def small(width):
        return torch.randn(width, generator=generator) * 0.1

    def linear(name, outputs, inputs):
        return {f"{name}.weight": matrix(outputs, inputs), f"{name}.bias": small(outputs)}

    def norm(name, width):
        return {f"{name}.weight": 1 + small(width), f"{name}.bias": small(width)}

    state = {"visual.patch_embed.proj.weight": matrix(vision, 3, 2, 14, 14)}
    for i in range(depths[0]):
        block = f"visual.blocks.{i}"
        state |= norm(f"{block}.norm1", vision) | norm(f"{block}.norm2", vision)
        state |= linear(f"{block}.attn.qkv", 3 * vision, vision) | linear(f"{block}.attn.proj", vision, vision)
        state |= linear(f"{block}.mlp.fc1", mlps[0], vision) | linear(f"{block}.mlp.fc2", vision, mlps[0])
    state |= norm("visual.merger.ln_q", vision)
    state |= linear("visual.merger.mlp.0", 4 * vision, 4 * vision) | linear("visual.merger.mlp.2", text, 4 * vision)
    state["model.embed_tokens.weight"] = torch.randn(vocabulary, text, generator=generator)
    for i in range(depths[1]):
        layer = f"model.layers.{i}"
        for part, width in (("q", text), ("k", pairs), ("v", pairs)):
            state |= linear(f"{layer}.self_attn.{part}_proj", width, text)
        state[f"{layer}.self_attn.o_proj.weight"] = matrix(text, text)
        for part in ("gate", "up"):
            state[f"{layer}.mlp.{part}_proj.weight"] = matrix(mlps[1], text)
        state[f"{layer}.mlp.down_proj.weight"] = matrix(text, mlps[1])
        for part in ("input", "post_attention"):
            state[f"{layer}.{part}_layernorm.weight"] = 1 + small(text)
    state["model.norm.weight"] = 1 + small(text)
    state["lm_head.weight"] = matrix(vocabulary, text)
    for place, inputs, outputs in zip((0, 3, 5), (text, *head), head, strict=False):
        state |= linear(f"rm_head.{place}", outputs, inputs)
    return state


def make_qwen2_5_vl(folder, **config):
    """A random Qwen2_5_VLForConditionalGeneration with its tokenizer, as `save_pretrained` writes them."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vocabulary = make_qwen_tokenizer(folder)
    text = dict(
        vocab_size=vocabulary + 10, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=48, fullatt_block_indexes=[1]
    )
    picture = vocabulary - len(SPECIAL) + SPECIAL.index("<|image_pad|>")
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=picture, **config)
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            std = 0.1 if weight.ndim < 2 else torch.Size(weight.shape[1:]).numel() ** -0.5
            std *= 2 if "_proj" in name else 1  # so that the answer depends on the picture
            weight.copy_(std * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1))
    model.save_pretrained(folder)
    return folder
