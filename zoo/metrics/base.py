"""What every measure of a reconstruction shares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Row(NamedTuple):
    """A number that a table shows."""

    name: str
    """In what compute returns, and in the report."""
    title: str
    better: str = ""
    """"higher", "lower", or "" where neither is."""
    format: str = ".3f"


class PerImage(Metric):
    """Mean over all images of `scores`, one number per name and image."""

    rows: tuple[Row, ...]
    """Those numbers that a table shows."""
    kinds: tuple[str, ...] = ("pixels", "depth")
    """What a tokenizer has to decode to (TokenizerInfo.decodes_to)."""
    names: tuple[str, ...] = ()
    """Of all scores; default: those of the rows."""
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.names = self.names or tuple(row.name for row in self.rows)
        self.add_state("total", torch.zeros(len(self.names), dtype=torch.float64), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, prediction: Tensor, target: Tensor, keys: Sequence[str] = ()) -> None:
        """Add a batch: float (B, C, H, W) in [0, 1] each, and the names of the images."""
        self.total += self.scores(prediction, target).double().sum(0)
        self.images += len(target)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.total / self.images, strict=True))

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, len(names))"""
        raise NotImplementedError
