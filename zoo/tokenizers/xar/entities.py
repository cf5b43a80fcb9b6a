"""What "X" is in next-X prediction: how the grid of latents is cut into the entities that are generated one by one.

Everything else of xAR depends only on the list that a partition is: the order of the tokens, which entity each belongs
to, and its row and column. Only cells of 8 x 8 on a grid of 16 x 16 can be checked against released weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError

ENTITIES = ("patch", "cell", "subsample", "scale", "image")


@dataclass(frozen=True)
class Partition:
    """Tokens of a grid in the order of generation."""

    grid: int
    lengths: tuple[int, ...]
    """Tokens of each entity."""
    rows: Tensor
    """(L,) row of each token on the grid, int64; in a partition by scales float, the centre of what it stands for."""
    columns: Tensor
    """(L,)"""
    scales: tuple[int, ...] = ()
    """Sides of the pictures of a partition by scales, coarse to fine; empty: every place of the grid occurs once."""

    @property
    def length(self) -> int:
        """L, tokens of all entities."""
        return sum(self.lengths)

    @property
    def starts(self) -> list[int]:
        """Position at which each entity begins."""
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    @property
    def entity(self) -> Tensor:
        """(L,) int64: number of the entity of each token."""
        return torch.tensor([number for number, length in enumerate(self.lengths) for _ in range(length)])

    def mask(self) -> Tensor:
        """(L, L) bool: a token looks at all tokens of its own entity and of earlier ones."""
        entity = self.entity
        return entity[:, None] >= entity[None, :]

    def context_mask(self) -> Tensor:
        """(2 L, 2 L) bool for all tokens clean, then all of them noisy.

        The clean look as in `mask`; a noisy one at the clean ones of earlier entities and the noisy ones of its own.
        """
        entity = self.entity
        clean, earlier = self.mask(), entity[:, None] > entity[None, :]
        return torch.cat([torch.cat([clean, earlier]), torch.cat([torch.zeros_like(clean), clean & ~earlier])], dim=1)

    def to_sequence(self, latents: Tensor) -> Tensor:
        """(B, C, g, g) to (B, L, C)."""
        if self.scales:
            pictures = [F.interpolate(latents, (side, side), mode="area").flatten(2) for side in self.scales]
            return torch.cat(pictures, dim=2).transpose(1, 2)
        places = (self.rows * self.grid + self.columns).to(latents.device)
        return latents.flatten(2)[:, :, places].transpose(1, 2)

    def to_grid(self, sequence: Tensor) -> Tensor:
        """(B, L, C) to (B, C, g, g); of a partition by scales the last picture."""
        if self.scales:
            return sequence[:, -self.lengths[-1] :].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        places = (self.rows * self.grid + self.columns).to(sequence.device)
        return sequence[:, places.argsort()].transpose(1, 2).unflatten(2, (self.grid, self.grid))


def partition(entity: str, grid: int, size: int = 1, scales: tuple[int, ...] = ()) -> Partition:
    """The partition of a grid of side `grid`.

    Args:
        entity: "patch" (one token), "cell" (size x size neighbours), "subsample" (every size-th row and column),
            "scale" (the whole picture at growing `scales`, by averaging), or "image" (all at once). Entities and the
            tokens within them come in raster order.
        size: see above; for "patch", "scale" and "image" it has no meaning.
        scales: sides of the pictures, rising, the last being the grid.

    Raises:
        ZooError: an unknown entity, or sizes that do not divide the grid.
    """
    if entity not in ENTITIES:
        raise ZooError(f"entity must be one of {', '.join(ENTITIES)}, got {entity!r}.")
    if entity == "scale":
        if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1 or scales[-1] != grid:
            raise ZooError(f"scales must rise from at least 1 to the grid's side {grid}, got {scales}.")
        places = [(torch.arange(side) + 0.5) * (grid / side) - 0.5 for side in scales]
        rows = torch.cat([p.repeat_interleave(len(p)) for p in places])
        columns = torch.cat([p.repeat(len(p)) for p in places])
        return Partition(grid, tuple(side * side for side in scales), rows, columns, tuple(scales))
    size = {"patch": 1, "image": grid}.get(entity, size)
    if size < 1 or grid % size:
        raise ZooError(f"a grid of {grid} x {grid} latents cannot be cut by {entity} {size}; take a divisor of {grid}.")
    places = torch.arange(grid * grid).view(grid // size, size, grid // size, size)  # (R, r, C, c)
    if entity == "subsample":  # entity (r, c), token (R, C), row R * size + r
        order, count = places.permute(1, 3, 0, 2).flatten(), size * size
    else:
        order, count = places.permute(0, 2, 1, 3).flatten(), (grid // size) ** 2
    return Partition(grid, (grid * grid // count,) * count, order // grid, order % grid)
