"""Keys and values of earlier tokens, for generation token by token or entity by entity."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Cache:
    """Keys and values of the tokens generated so far, of every block: written in place, read as a slice.

    blocks: those whose `attn.num_heads` says how the width is split; like: a tensor (..., D) of their width, dtype and
    device.
    """

    def __init__(self, rows: int, length: int, blocks: Sequence[nn.Module], like: Tensor):
        self.rows, self.length = rows, length
        self.size = 0
        """Tokens it holds, counted by its owner: a token is there once every block has written it."""
        self.buffers = []
        for block in blocks:
            heads = block.attn.num_heads
            shape = (2, rows, heads, length, like.shape[-1] // heads)
            self.buffers.append(like.new_empty(shape))

    def update(self, number: int, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Put keys and values (R, H, n, d) of a block at `start`; returns those of all tokens up to their end.

        R may be below the number of rows: then only the first R take part.
        """
        end, buffer = start + keys.shape[2], self.buffers[number][:, : len(keys)]
        buffer[0, :, :, start:end], buffer[1, :, :, start:end] = keys, values
        return buffer[0, :, :, :end], buffer[1, :, :, :end]
