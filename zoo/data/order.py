"""Which sample comes when: pure functions of a seed and a number."""

from functools import lru_cache

import numpy as np

BLOCK = 1 << 16  # positions of an epoch that are dealt out to the sources of a mix together


class Order:
    """The order of the samples of one source, pass after pass: its units (shards, files) are put in a new order, then
    the samples within every `window` of that sequence. Without `shuffled` every pass is in the given order.

    sizes: (units,) number of samples of each unit.
    """

    def __init__(self, sizes: np.ndarray, seed: tuple[int, ...], window: int, shuffled: bool = True):
        self.sizes, self.count, self.seed = sizes, int(sizes.sum()), seed
        self.window, self.shuffled = max(1, window), shuffled

    def __call__(self, turn: int, position: int) -> tuple[int, int]:
        """(unit, number within it) at a position below `count` of pass `turn`."""
        if self.shuffled:
            block, place = divmod(position, self.window)
            position = block * self.window + int(self._window(turn, block)[place])
        units, ends = self._units(turn)
        i = int(np.searchsorted(ends, position, side="right"))
        return int(units[i]), position - int(ends[i] - self.sizes[units[i]])

    @lru_cache(maxsize=4)  # noqa: B019 - lives as long as the process that reads
    def _units(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        units = np.arange(len(self.sizes))
        if self.shuffled:
            units = np.random.default_rng([*self.seed, turn]).permutation(units)
        return units, self.sizes[units].cumsum()

    @lru_cache(maxsize=8)  # noqa: B019
    def _window(self, turn: int, block: int) -> np.ndarray:
        size = min(self.window, self.count - block * self.window)
        return np.random.default_rng([*self.seed, turn, block]).permutation(size)


class Mix:
    """Deals the positions of an epoch out to sources at random, exactly `quotas[s]` of them to source s."""

    def __init__(self, quotas: np.ndarray, seed: tuple[int, ...]):
        self.quotas, self.seed = quotas, seed

    def __call__(self, epoch: int, position: int) -> tuple[int, int]:
        """(source, how many earlier positions of the epoch have gone to it)."""
        if len(self.quotas) == 1:
            return 0, position
        block, place = divmod(position, BLOCK)
        sources, ordinals = self._block(epoch, block)
        return int(sources[place]), int(ordinals[place])

    @lru_cache(maxsize=2)  # noqa: B019
    def _shares(self, epoch: int) -> np.ndarray:
        """(blocks, sources) how many positions of each block go to each source."""
        rng, left, shares = np.random.default_rng([*self.seed, epoch]), self.quotas.copy(), []
        while left.sum() > BLOCK:
            shares.append(rng.multivariate_hypergeometric(left, BLOCK, method="marginals"))
            left -= shares[-1]
        return np.stack([*shares, left])

    @lru_cache(maxsize=4)  # noqa: B019
    def _block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        shares = self._shares(epoch)
        sources = np.repeat(np.arange(len(self.quotas)), shares[block])
        sources = np.random.default_rng([*self.seed, epoch, block]).permutation(sources)
        ordinals = np.empty(len(sources), np.int64)
        for s, earlier in enumerate(shares[:block].sum(0)):
            ordinals[sources == s] = earlier + np.arange(shares[block, s])
        return sources, ordinals


def quotas(weights: list[float], total: int) -> np.ndarray:
    """`total` in whole parts as near to the weights as can be."""
    exact = np.array(weights, float) * (total / sum(weights))
    parts = np.floor(exact + 1e-6).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts
