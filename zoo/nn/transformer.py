"""Transformer blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys and values (B, heads, N, d) of these tokens, returns those of all tokens to attend to."""


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come from one projection, in this order."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False, remember: Remember | None = None
    ) -> Tensor:
        """x (B, N, D); mask: bool, broadcastable to (B, heads, N, N), True where a row may look at a column;
        is_causal: a token looks at itself and at those before it; remember: a cache of earlier tokens.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        if remember is not None:
            k, v = remember(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Linear, GELU (exact), Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202) with as many parameters as the Mlp of that hidden width has.

    Its own hidden width is two thirds of that, up to the next multiple of 8, as in DINOv2 (arXiv 2304.07193).
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: int = 4, mlp: type[Mlp | SwiGLU] = Mlp, eps: float = 1e-5
    ):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps), Attention(width, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), mlp(width, mlp_ratio * width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False, remember: Remember | None = None
    ) -> Tensor:
        """x (B, N, D); others: see Attention."""
        x = x + self.attn(self.norm1(x), mask, is_causal, remember)
        return x + self.mlp(self.norm2(x))
