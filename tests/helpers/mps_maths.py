"""The maths of MPS in plain torch, from the names in its file, for one picture at a time."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from rewards.mps import CONDITION


def score(state, clip, tokenize: Callable, pixels, prompt) -> torch.Tensor:
    """The published formula with its sums written out, for one picture [3, 56, 56] and a CLIP in float64."""
    words, text = texts(clip, tokenize, prompt)
    condition, _ = texts(clip, tokenize, CONDITION)
    likeness = torch.einsum("id,jd->ji", words, condition).max(dim=0).values
    mask = torch.where(likeness / likeness.max() > 0.01, 0.0, -torch.inf)
    x = clip.visual_projection(clip.vision_model(pixel_values=pixels[None]).last_hidden_state)[0]
    for i in range(4):
        one, two = (partial(weight_of, state, f"cross_model.layers.{i}.{j}.fn") for j in (0, 1))
        h = F.layer_norm(x, x.shape[-1:], one("norm"))
        key, value = (words @ one("to_kv").T).split(64, dim=-1)
        x = x + attention(h @ one("to_q").T, key, value, mask) @ one("to_out").T
        x = x + gated(h @ one("ff.0").T) @ one("ff.2").T
        h = F.layer_norm(x, x.shape[-1:], two("norm")) @ two("fused_attn_ff_proj").T
        query, key, value, inner = h.split((128, 64, 64, 1024), dim=-1)
        query = torch.cat([turned(part) for part in query.split(64, dim=-1)], dim=-1)
        x = x + attention(query, turned(key), value, 0.0) @ two("attn_out").T + gated(inner) @ two("ff_out.1").T
    return clip.logit_scale.exp() * F.cosine_similarity(x[0], text, dim=0)


def texts(clip, tokenize, prompt):
    output = clip.text_model(input_ids=tokenize([prompt]))
    return clip.text_projection(output.last_hidden_state)[0], clip.text_projection(output.pooler_output)[0]


def weight_of(state, part, name):
    return state[f"{part}.{name}.weight"].double()


def attention(query, key, value, mask):
    parts = [(part @ key.T / 8 + mask).softmax(dim=-1) @ value for part in query.split(64, dim=-1)]
    return torch.cat(parts, dim=-1)


def gated(x):
    x, gate = x.chunk(2, dim=-1)
    return gate * gate.sigmoid() * x


def turned(x):
    """Each pair (i, i + 32) as a complex number, turned by the position times its frequency."""
    angles = torch.outer(torch.arange(len(x)).double(), 10000 ** -(torch.arange(32).double() / 32))
    pairs = torch.complex(x[:, :32], x[:, 32:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)
