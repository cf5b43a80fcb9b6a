"""How benchmarks are timed."""

import time
from collections.abc import Callable
from typing import Any


def best_of(rounds: int, contenders: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of the best round and the last result of each contender, by name; contenders take turns."""
    best, results = dict.fromkeys(contenders, float("inf")), {}
    for _ in range(rounds):
        for name, call in contenders.items():
            begin = time.perf_counter()
            results[name] = call()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best, results
