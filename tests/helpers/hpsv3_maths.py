"""The maths of HPSv3, stated once more in plain torch, from the names in its file, for one picture at a time."""

import torch
import torch.nn.functional as F

from rewards.hpsv3_prompt import INSTRUCTION

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
    "{text}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tokens_of(tokenizer, prompt: str, number: int) -> torch.Tensor:
    """The ids of the whole chat with `number` image tokens, which goes on behind the reward token."""
    text = INSTRUCTION.format(text_prompt=prompt)
    return torch.tensor(tokenizer(CHAT.format(pads="<|image_pad|>" * number, text=text)).input_ids)


def score(state: dict, picture: torch.Tensor, tokens: torch.Tensor, reward_token: int, image_token: int):
    """Both outputs, mean and log deviation, [2], of a picture [3, H, W] in [0, 1] of a size that fits."""
    w = {name: weight.to(picture.dtype) for name, weight in state.items()}
    words = w["model.embed_tokens.weight"][tokens]
    first = tokens.tolist().index(image_token)
    words = torch.cat([words[:first], read(w, picture), words[first + (tokens == image_token).sum() :]])
    states = think(w, words)[tokens.tolist().index(reward_token)]
    for place in (0, 3):
        states = F.relu(linear(w, f"rm_head.{place}", states))
    return linear(w, "rm_head.5", states)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def layer_norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def rms_norm(w, name, x):
    return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x, cos, sin):
    """x [N, heads, d] by angles [N, d/2]."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def frequencies(width, base):
    return (1 / base ** (torch.arange(0, width, 2) / width)).bfloat16()


def attend(q, k, v, mask=None):
    """Of [N, heads, d]; heads of k and v serve several of q."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).flatten(1)


def read(w, picture):
    """The image tokens. Patches stay in rows, since attention knows them by their angles alone."""
    mean, std = (torch.tensor(v, dtype=torch.float32).to(picture.dtype)[:, None, None] for v in (MEAN, STD))
    kernel = w["visual.patch_embed.proj.weight"].sum(2)  # both frames are the same picture
    patches = F.conv2d((picture - mean)[None] / std, kernel, stride=14)[0]
    rows, columns = patches.shape[1:]
    x, heads = patches.flatten(1).T, len(patches) // 80
    at = [torch.arange(n).bfloat16()[:, None] * frequencies(40, 10000.0) for n in (rows, columns)]
    angles = torch.cat([at[0].repeat_interleave(columns, 0), at[1].repeat(rows, 1)], dim=1)
    for i in range(depth(w, "visual.blocks")):
        name = f"visual.blocks.{i}"
        q, k, v = (
            linear(w, f"{name}.attn.qkv", layer_norm(w, f"{name}.norm1", x)).unflatten(1, (3, heads, 80)).unbind(1)
        )
        q, k = (rotate(part, angles.cos(), angles.sin()) for part in (q, k))
        x = x + linear(w, f"{name}.attn.proj", attend(q, k, v))
        inner = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x))
        x = x + linear(w, f"{name}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))
    x = layer_norm(w, "visual.merger.ln_q", x).view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2)
    x = F.gelu(linear(w, "visual.merger.mlp.0", x.reshape(rows * columns // 4, -1)))
    return linear(w, "visual.merger.mlp.2", x)


def think(w, x):
    """The final states of words [N, D]."""
    angles = torch.arange(len(x)).float()[:, None] * frequencies(128, 1e6).float()
    mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    for i in range(depth(w, "model.layers")):
        name = f"model.layers.{i}"
        inner = rms_norm(w, f"{name}.input_layernorm", x)
        q, k, v = (linear(w, f"{name}.self_attn.{p}_proj", inner).unflatten(1, (-1, 128)) for p in "qkv")
        q, k = (rotate(part, angles.cos(), angles.sin()) for part in (q, k))
        x = x + linear(w, f"{name}.self_attn.o_proj", attend(q, k, v, mask))
        inner = rms_norm(w, f"{name}.post_attention_layernorm", x)
        inner = F.silu(linear(w, f"{name}.mlp.gate_proj", inner)) * linear(w, f"{name}.mlp.up_proj", inner)
        x = x + linear(w, f"{name}.mlp.down_proj", inner)
    return rms_norm(w, "model.norm", x)


def depth(w, layers):
    return len({name.split(".")[2] for name in w if name.startswith(layers)})
