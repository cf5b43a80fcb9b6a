"""Projections between the width of the tower and that of the codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.errors import ZooError


class ProjectionAttention(nn.Module):
    """Self-attention that changes the width: a narrower output is the mean of the heads, a wider one all of them."""

    def __init__(self, inner: int, outer: int, num_heads: int, causal: bool):
        super().__init__()
        width = max(inner, outer)
        self.outer, self.num_heads, self.causal, self.narrows = outer, num_heads, causal, inner > outer
        self.qkv = nn.Linear(inner, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(outer, outer)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, inner) -> (B, N, outer)."""
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.zero_k_bias, self.v_bias]))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        if self.narrows:
            out = out.mean(1)
            if out.shape[-1] != self.outer:
                out = F.adaptive_avg_pool1d(out, self.outer)
        else:
            out = rearrange(out, "b h n d -> b n (h d)")
        return self.proj(out)


class GeGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202) of twice the width, after a norm of its own."""

    def __init__(self, width: int, mlp_ratio: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.w0, self.w1 = nn.Linear(width, mlp_ratio * width), nn.Linear(width, mlp_ratio * width)
        self.w2 = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class AttentionProjection(nn.Module):
    """y = proj(norm3(x)) + attn(norm1(x)), then y + mlp(norm2(y)): (B, N, inner) to (B, N, outer), x is not added.

    causal: a token depends on itself and those before it in raster order. One of the widths is a multiple of the other,
    and the larger one of num_heads.
    """

    def __init__(self, inner: int, outer: int, num_heads: int, causal: bool = False):
        super().__init__()
        if max(inner, outer) % min(inner, outer) or max(inner, outer) % num_heads:
            raise ZooError(
                f"a projection from {inner} to {outer} with {num_heads} heads: one width must be a multiple of the "
                "other, and the larger one of the heads."
            )
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(inner), nn.LayerNorm(outer), nn.LayerNorm(inner)
        self.attn = ProjectionAttention(inner, outer, num_heads, causal)
        self.proj, self.mlp = nn.Linear(inner, outer), GeGLU(outer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))
