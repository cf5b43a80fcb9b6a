"""Which training sample of the language model comes when: from drawing depth maps to reasoning with them.

AURORA section 3.3 and its data script. Perception samples ask for the perception tokens alone; multi-task samples
(a direct answer and a chain of thought per image) use them. The paper's formula with a temperature is not what its
authors run, and with its stated sign it would move towards the easiest task, so only the table they run is here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from zoo.errors import ZooError


class CurriculumSampler(Sampler[int]):
    """Indices into ConcatDataset([perception, multitask]): `epochs` epochs back to back, in order, in one pass.

    Epoch e of E draws a share 1 - e/E of the perception samples without replacement, followed by the multi-task
    samples in order, repeated as often as they fit into the rest of an epoch of num_perception samples.

    Args:
        num_perception, num_multitask: lengths of the two data sets.
        epochs: E, published 10.
        seed: of the draws; 0 gives the authors' order.
    """

    def __init__(self, num_perception: int, num_multitask: int, epochs: int = 10, seed: int = 0):
        if num_perception < 1 or num_multitask < 1 or epochs < 1:
            raise ZooError(
                "a curriculum needs at least one perception sample, one multi-task sample and one epoch, got "
                f"{num_perception}, {num_multitask} and {epochs}."
            )
        self.num_perception, self.num_multitask = num_perception, num_multitask
        self.num_epochs, self.seed = epochs, seed

    def epochs(self) -> Iterator[tuple[list[int], int]]:
        """(perception samples drawn, repetitions of the multi-task list) of each epoch."""
        draw = random.Random(self.seed)
        for epoch in range(self.num_epochs):
            count = self.num_perception * (self.num_epochs - epoch) // self.num_epochs
            yield draw.sample(range(self.num_perception), count), (self.num_perception - count) // self.num_multitask

    def __iter__(self) -> Iterator[int]:
        multitask = range(self.num_perception, self.num_perception + self.num_multitask)
        for perception, repetitions in self.epochs():
            yield from perception
            for _ in range(repetitions):
                yield from multitask

    def __len__(self) -> int:
        return sum(len(perception) + repetitions * self.num_multitask for perception, repetitions in self.epochs())
