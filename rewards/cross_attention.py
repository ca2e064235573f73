"""MPS's cross-attention network: the tokens of a picture look at the words of a prompt, and at one another."""

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTH = 64
WIDENING = 4  # how much wider the inside of a feed-forward network is
ROTATION_BASE = 10000.0


class CrossModel(nn.Module):
    """Layers of cross-attention and self-attention, each with a feed-forward network beside it and a residual.

    The attention is multi-query (arXiv 1911.02150): the heads share one key and one value.

    Args:
        width: The width of the tokens, a multiple of HEAD_WIDTH (1024 in the released model).
        depth: The number of layers.
    """

    def __init__(self, width: int, depth: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"cross": CrossAttention(width), "own": SelfAttention(width)}) for _ in range(depth)
        )

    def forward(self, tokens: torch.Tensor, words: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Returns new tokens [B, N, width] of a picture.

        Args:
            tokens: [B, N, width].
            words: The words [B, L, width] of the prompts.
            seen: Which words the tokens look at, [B, L] bool. Each row has at least one.
        """
        for layer in self.layers:
            tokens = tokens + layer["cross"](tokens, words, seen)
            tokens = tokens + layer["own"](tokens)
        return tokens


class CrossAttention(nn.Module):
    """Attention of tokens to words, plus a feed-forward network on the same normalised tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * WIDENING * width, bias=False), SwiGLU(), nn.Linear(WIDENING * width, width, bias=False)
        )

    def forward(self, tokens: torch.Tensor, words: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(tokens)
        key, value = self.to_kv(words).chunk(2, dim=-1)
        return self.to_out(attend(heads_of(self.to_q(tokens)), key, value, seen)) + self.ff(tokens)


class SelfAttention(nn.Module):
    """Attention of tokens to one another with rotary positions, and a feed-forward network, from one projection."""

    def __init__(self, width: int):
        super().__init__()
        self.widths = (width, HEAD_WIDTH, HEAD_WIDTH, 2 * WIDENING * width)
        self.norm = nn.LayerNorm(width, bias=False)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(WIDENING * width, width, bias=False))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value, inner = self.fused_attn_ff_proj(self.norm(tokens)).split(self.widths, dim=-1)
        return self.attn_out(attend(rotate(heads_of(query)), rotate(key), value)) + self.ff_out(inner)


class SwiGLU(nn.Module):
    """The gated activation of arXiv 2002.05202: [..., 2 D] to [..., D]. The second half is the gate."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """Splits [B, N, width] into heads [B, heads, N, HEAD_WIDTH]."""
    return x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None = None):
    """Returns [B, N, width] of queries [B, heads, N, HEAD_WIDTH], with a key and a value [B, L, HEAD_WIDTH] for all.

    seen: Which of the L are looked at, [B, L] bool. None: all of them.
    """
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    mask = None if seen is None else seen[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotates [..., N, D] by its positions 0 … N - 1 (RoFormer, arXiv 2104.09864). Entry i belongs with i + D/2."""
    half = x.shape[-1] // 2
    frequencies = ROTATION_BASE ** -(torch.arange(half, device=x.device) / half)
    angles = torch.outer(torch.arange(x.shape[-2], device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
