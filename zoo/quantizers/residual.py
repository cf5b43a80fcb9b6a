"""Residual quantisation: each level codes what the levels before it left (arXiv 2203.01941, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.distributed import from_first_rank, world_size
from zoo.errors import ZooError
from zoo.quantizers.ema import code_counts, code_statistics, drawn_over_ranks, perplexity
from zoo.quantizers.search import nearest_code

KINDS = ("rq", "rq_ema")
EMA_VECTORS = ("final", "level")


class ResidualQuantized(NamedTuple):
    """What a residual quantizer gives."""

    quantized: Tensor
    """(..., D): sums of codes, with the gradient of the vectors (straight-through)."""
    ids: Tensor
    """(..., levels) int64."""
    loss: Tensor
    """Scalar: mean over levels of the mean squared distance to the sum of codes so far; moves the encoder alone."""
    perplexity: Tensor
    """Scalar: exp of the entropy of this batch's codes over all ranks, 1 to K; mean over codebooks."""
    usage: Tensor
    """Scalar: share of the codes that this batch uses over all ranks; mean over codebooks."""
    counts: Tensor
    """(levels, K) float32: how often each code was used over all ranks; 0 beyond the codes that a level has."""


class ResidualCodebook(nn.Module):
    """K codes that are running means. With decay g and the counts n and sums s of a batch over all ranks:

    N <- g N + (1-g) n and m <- g m + (1-g) s; a code with N < 1 is restarted, its m a random vector of the batch and
    its N 1; code = m / ((N + eps) / (sum N + K eps) * sum N). N itself is kept without smoothing.
    """

    def __init__(self, num_codes: int, dim: int, decay: float, restart: bool, eps: float):
        super().__init__()
        self.decay, self.restart, self.eps = decay, restart, eps
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_sum", self.codebook.clone())

    @torch.no_grad()
    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Move the codes by the vectors (M, L, D) with ids (M, L) of L levels; each rank has as many."""
        counts, sums = code_statistics(vectors.flatten(0, 1), ids.flatten(), len(self.codebook))
        size = self.cluster_size.float().lerp(counts, 1 - self.decay)
        embed_sum = self.embed_sum.float().lerp(sums, 1 - self.decay)
        if self.restart:
            dead = size < 1
            size = size.where(~dead, 1.0)
            embed_sum = embed_sum.where(~dead[:, None], self.candidates(vectors))
        total = size.sum()
        smoothed = (size + self.eps) / (total + len(size) * self.eps) * total
        # in place: whoever holds the buffers (DDP, an average of weights) goes on seeing them
        self.cluster_size.copy_(size)
        self.embed_sum.copy_(embed_sum)
        # nothing was counted yet when a very first batch has no finite vector
        self.codebook.copy_((embed_sum / smoothed[:, None]).where(total > 0, self.codebook.float()))

    def candidates(self, vectors: Tensor) -> Tensor:
        """K random vectors (K, D) of those (M, L, D) of all ranks, by the random numbers of rank 0.

        Of fewer than K there are copies, with noise from 0 to 0.01 / sqrt(D) added to them.
        """
        (num_codes, dim), (local, levels, _) = self.codebook.shape, vectors.shape
        rows = local * world_size()
        total = rows * levels
        order = torch.randperm(total * -(-num_codes // total), device=vectors.device)[:num_codes] % total
        # drawn as if one rank had all vectors, level after level; they lie rank after rank
        level, row = order // rows, order % rows
        index = (row // local * levels + level) * local + row % local
        drawn = drawn_over_ranks(vectors.transpose(0, 1).flatten(0, 1), index, self.codebook)
        if total < num_codes:
            drawn = drawn + from_first_rank(torch.rand_like(drawn)) * (0.01 / dim**0.5)
        return drawn


class ResidualQuantizer(nn.Module):
    """Residual quantizer with running means, in the two kinds that DualToken's code has; both evaluate alike.

    Args:
        num_codes: K, or one of each level.
        dim: D, width of the vectors.
        levels: ids per vector.
        decay: of the running means, or one of each level.
        kind: when codes move in training mode. "rq": within each level, after its search, so that with a shared
            codebook the next level searches codes that have moved; "rq_ema": once, after the last level.
        shared: one codebook for all levels.
        ema_vectors: what "rq_ema" counts as the vectors of a level. "final": what the last level leaves, as published
            (a cached view that is overwritten; codes shrink towards the mean of that); "level": the vectors that were
            searched, as meant.
        restart: codes that are hardly used become vectors of the batch, see ResidualCodebook.
        cell: rows and columns of a map of vectors that share ids; vectors are then (B, H, W, D).
        eps: of the smoothing.

    Raises:
        ZooError: an unknown kind, or lists whose length is not the number of levels.
    """

    def __init__(
        self,
        num_codes: int | Sequence[int],
        dim: int,
        levels: int,
        decay: float | Sequence[float] = 0.99,
        kind: str = "rq",
        shared: bool = True,
        ema_vectors: str = "final",
        restart: bool = True,
        cell: tuple[int, int] = (1, 1),
        eps: float = 1e-5,
    ):
        super().__init__()
        if kind not in KINDS or ema_vectors not in EMA_VECTORS:
            raise ZooError(
                f"a residual quantizer is of kind {' or '.join(KINDS)} with ema_vectors {' or '.join(EMA_VECTORS)}, "
                f"got {kind!r} and {ema_vectors!r}."
            )
        if levels < 1:
            raise ZooError(f"a residual quantizer has at least one level, got {levels}.")
        books = 1 if shared else levels
        sizes, decays = per_codebook(num_codes, books, "num_codes"), per_codebook(decay, books, "decay")
        self.levels, self.kind, self.ema_vectors, self.cell = levels, kind, ema_vectors, tuple(cell)
        width = dim * self.cell[0] * self.cell[1]
        self.codebooks = nn.ModuleList(
            ResidualCodebook(size, width, g, restart, eps) for size, g in zip(sizes, decays, strict=True)
        )

    def codebook(self, level: int) -> ResidualCodebook:
        """That of a level; the same one at every level when it is shared."""
        return self.codebooks[level % len(self.codebooks)]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each codebook: of one that all levels share, or of those of the levels."""
        return tuple(len(book.codebook) for book in self.codebooks)

    def forward(self, z: Tensor) -> ResidualQuantized:
        """z (..., D), in float32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            cells = self.to_cells(z.float())
            exact = cells.reshape(-1, cells.shape[-1])
            residual, total, loss = exact.detach(), torch.zeros_like(exact), 0
            searched, ids = [], []
            for level in range(self.levels):
                book = self.codebook(level)
                chosen = nearest_code(residual, book.codebook)
                codes = book.codebook[chosen].float()
                searched.append(residual)
                ids.append(chosen)
                total, residual = total + codes, residual - codes
                loss = loss + F.mse_loss(exact, total) / self.levels
                if self.training and self.kind == "rq":
                    book.update(searched[-1][:, None], chosen[:, None])
            stacked = torch.stack(ids, -1)
            if self.training and self.kind == "rq_ema":
                vectors = searched if self.ema_vectors == "level" else [residual] * self.levels
                self._update_after_pass(torch.stack(vectors, 1), stacked)
            quantized = self.from_cells((exact + (total - exact).detach()).view(cells.shape)).to(z.dtype)
            used = self._statistics(stacked)
        return ResidualQuantized(quantized, stacked.view(*cells.shape[:-1], self.levels), loss, *used)

    def encode(self, z: Tensor, levels: int | None = None) -> Tensor:
        """z (..., D) -> ids (..., levels) int64, of the first levels or of all, without moving anything."""
        residual, ids = self.to_cells(z.float()), []
        for level in range(levels or self.levels):
            codebook = self.codebook(level).codebook
            ids.append(nearest_code(residual, codebook))
            residual = residual - codebook[ids[-1]]
        return torch.stack(ids, -1)

    def codes(self, ids: Tensor) -> Tensor:
        """ids (..., levels) -> (..., D): the sum over levels; fewer than all levels are a coarser value."""
        return self.from_cells(self.embeddings(ids).sum(-2))

    def embeddings(self, ids: Tensor) -> Tensor:
        """ids (..., levels) -> (..., levels, D of a cell): the code of each level."""
        if len(self.codebooks) == 1:
            return self.codebooks[0].codebook[ids]
        return torch.stack([self.codebook(i).codebook[one] for i, one in enumerate(ids.unbind(-1))], -2)

    def to_cells(self, z: Tensor) -> Tensor:
        """(B, H, W, D) to (B, H / rows, W / columns, rows * columns * D); as it is where a cell is one vector."""
        rows, columns = self.cell
        if self.cell == (1, 1):
            return z
        return rearrange(z, "b (h r) (w c) d -> b h w (r c d)", r=rows, c=columns)

    def from_cells(self, cells: Tensor) -> Tensor:
        """The inverse of to_cells."""
        rows, columns = self.cell
        if self.cell == (1, 1):
            return cells
        return rearrange(cells, "b h w (r c d) -> b (h r) (w c) d", r=rows, c=columns)

    def _update_after_pass(self, vectors: Tensor, ids: Tensor) -> None:
        if len(self.codebooks) == 1:
            return self.codebooks[0].update(vectors, ids)
        for book, of_level, chosen in zip(self.codebooks, vectors.unbind(1), ids.unbind(1), strict=True):
            book.update(of_level[:, None], chosen[:, None])

    @torch.no_grad()
    def _statistics(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Perplexity, share of used codes, and counts (levels, K) of ids (M, levels), over all ranks."""
        size = max(self.codebook_sizes)
        places = ids + size * torch.arange(self.levels, device=ids.device)
        counts = code_counts(places.flatten(), self.levels * size).view(self.levels, size)
        found = []
        for book, used in zip(self.codebooks, counts if len(self.codebooks) > 1 else [counts.sum(0)], strict=True):
            found.append(torch.stack([perplexity(used), (used > 0).sum() / len(book.codebook)]))
        return *torch.stack(found).mean(0).unbind(), counts


def per_codebook(value, count: int, name: str) -> list:
    """One value for each codebook. Raises ZooError for a list of another length."""
    if isinstance(value, Sequence):
        if len(value) != count:
            raise ZooError(f"{name} must be one value, or one for each of {count} codebooks, got {list(value)}.")
        return list(value)
    return [value] * count
