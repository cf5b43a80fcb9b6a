"""The causal Q-Former of SEED: BERT (arXiv 1810.04805) whose queries read an image, after BLIP-2 (arXiv 2301.12597)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.errors import ZooError

EPS = 1e-12
"""Of every LayerNorm."""

CAUSAL_QUERIES = 32
"""The number of queries at which the published code makes them causal; with any other they all see each other."""


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are BERT-base, as published."""

    num_queries: int = 32
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072
    """Width within the feed-forward layers."""
    cross_every: int = 2
    """Layers 0, cross_every, 2 cross_every, ... read the image."""
    dropout: float = 0.1
    causal: str = "auto"
    """Whether query i sees queries 0..i alone: "auto" (as published: if and only if there are 32), "always" or "never"
    (the ablation of the paper)."""
    vocab_size: int = 0
    """Words of the text side; 0: there is none."""
    max_positions: int = 512
    """Of texts, in tokens."""
    init_std: float = 0.02
    """Of fresh linear layers and embeddings. Narrow networks need more, or attention begins uniform and queries stay
    alike: 0.02 sqrt(768 / width) is what the published one has."""

    def __post_init__(self):
        name = type(self).__name__
        if self.causal not in ("auto", "always", "never"):
            raise ZooError(f"{name}.causal must be 'auto', 'always' or 'never', got {self.causal!r}.")
        if min(self.num_queries, self.depth, self.hidden, self.cross_every, self.max_positions) < 1:
            raise ZooError(f"{name}.num_queries, depth, hidden, cross_every and max_positions must be at least 1.")
        if self.num_heads < 1 or self.width < 1 or self.width % self.num_heads:
            raise ZooError(f"{name}.width {self.width} must be a multiple of num_heads {self.num_heads}.")
        if not 0 <= self.dropout < 1:
            raise ZooError(f"{name}.dropout must be in [0, 1), got {self.dropout}.")
        if self.vocab_size < 0 or self.init_std < 0:
            raise ZooError(f"{name}.vocab_size and init_std must not be below 0.")

    def is_causal(self, num_queries: int) -> bool:
        """Whether that many queries are causal."""
        return self.causal == "always" or (self.causal == "auto" and num_queries == CAUSAL_QUERIES)


class Attention(nn.Module):
    """norm(x + projected attention), to x itself or to a context."""

    def __init__(self, c: QFormerConfig, context_width: int | None = None):
        super().__init__()
        self.num_heads, self.dropout = c.num_heads, c.dropout
        width = c.width if context_width is None else context_width
        self.q, self.k, self.v = nn.Linear(c.width, c.width), nn.Linear(width, c.width), nn.Linear(width, c.width)
        self.proj, self.norm, self.drop = nn.Linear(c.width, c.width), nn.LayerNorm(c.width, EPS), nn.Dropout(c.dropout)

    def heads(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (B, N, D), keys and values of the context (B, M, C) or of x: (B, heads, N or M, d) each."""
        read = x if context is None else context
        parts = self.q(x), self.k(read), self.v(read)
        return tuple(rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, N, D), context (B, M, C); mask: bool, broadcastable to (B, heads, N, M), True where a row looks."""
        dropout = self.dropout if self.training else 0.0
        q, k, v = self.heads(x, context)
        q = q.expand(len(k), -1, -1, -1)  # of queries that no image has told apart yet
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        return self.norm(self.drop(self.proj(rearrange(out, "b h n d -> b n (h d)"))) + x)


class FeedForward(nn.Module):
    """norm(x + Linear, GELU (exact), Linear)."""

    def __init__(self, c: QFormerConfig):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)
        self.norm, self.drop = nn.LayerNorm(c.width, EPS), nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.fc2(F.gelu(self.fc1(x)))) + x)


class Layer(nn.Module):
    """Self-attention of queries and text together; then queries read the image, and each has a feed-forward layer."""

    def __init__(self, c: QFormerConfig, context_width: int | None):
        super().__init__()
        self.attn = Attention(c)
        self.cross_attn = None if context_width is None else Attention(c, context_width)
        self.query_mlp = FeedForward(c)
        self.text_mlp = FeedForward(c) if c.vocab_size else None

    def forward(self, x: Tensor, num_queries: int, context: Tensor | None, mask: Tensor | None, is_causal: bool):
        """x (B, Q + L, D), queries first; others: see Attention."""
        x = self.attn(x, mask=mask, is_causal=is_causal)
        parts = []
        if num_queries:
            queries = x[:, :num_queries]
            if self.cross_attn is not None:
                queries = self.cross_attn(queries, context)
            parts.append(self.query_mlp(queries))
        if num_queries < x.shape[1]:
            parts.append(self.text_mlp(x[:, num_queries:]))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class QFormer(nn.Module):
    """Queries that read an image, a text, or both in one sequence.

    Args:
        config: its sizes.
        context_width: width of what the queries read.
    """

    def __init__(self, config: QFormerConfig, context_width: int):
        super().__init__()
        c = self.config = config
        if c.vocab_size:
            self.token_embed, self.pos_embed = (
                nn.Embedding(c.vocab_size, c.width),
                nn.Embedding(c.max_positions, c.width),
            )
        self.norm, self.drop = nn.LayerNorm(c.width, EPS), nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(Layer(c, None if i % c.cross_every else context_width) for i in range(c.depth))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights as published: BERT's, and query layers that begin as those of text."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for layer in self.layers if self.config.vocab_size else ():
            layer.query_mlp.load_state_dict(layer.text_mlp.state_dict())

    def forward(
        self,
        queries: Tensor | None = None,
        context: Tensor | None = None,
        ids: Tensor | None = None,
        live: Tensor | None = None,
        decoder: bool = False,
        causal: bool | None = None,
    ) -> Tensor:
        """Queries (B or 1, Q, D), text or both, one after the other, to (B, Q + L, D).

        Args:
            context: (B, M, C), what the queries read.
            ids: (B, L) int64 words of a text.
            live: (B, L) bool, False where the text is padding, which nothing sees.
            decoder: a word sees the queries and the words up to itself, and queries see no word (captioning).
            causal: of the queries; None: as published, by their number, and never with decoder in the same call. A
                caption of causal queries is learned with True.
        """
        num_queries = 0 if queries is None else queries.shape[1]
        parts = []
        if queries is not None:
            # until they read an image, and without dropout, the same for all images
            same = ids is None and not (self.training and self.config.dropout)
            parts.append(queries if same else queries.expand(len(context), -1, -1))
        if ids is not None:
            parts.append(self.token_embed(ids) + self.pos_embed.weight[: ids.shape[1]])
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if causal is None:
            causal = self.config.is_causal(num_queries) and not decoder
        mask = None if ids is None else visible(num_queries, ids, live, causal, decoder)
        x = self.drop(self.norm(x))
        for layer in self.layers:
            x = layer(x, num_queries, context, mask, is_causal=causal and ids is None)
        return x


def visible(num_queries: int, ids: Tensor, live: Tensor | None, causal: bool, decoder: bool = False) -> Tensor:
    """(B or 1, 1, T, T) bool, T = Q + L: which rows look at which columns, see QFormer.forward; padding is hidden."""
    total = num_queries + ids.shape[1]
    seen = torch.ones(total, total, dtype=torch.bool, device=ids.device)
    if decoder:
        seen[num_queries:] = seen[num_queries:].tril(num_queries)
        seen[:num_queries, num_queries:] = False
    if causal:
        seen[:num_queries, :num_queries].tril_()
    if live is None:
        return seen[None, None]
    return seen & F.pad(live, (num_queries, 0), value=True)[:, None, None]
