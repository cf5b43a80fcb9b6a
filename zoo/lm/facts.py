"""What captions say of the embedded scenes and what is in them, in one form, and how far two such statements agree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from zoo.data.labels import ATTRIBUTES
from zoo.data.render import NUMBERS, ROOM_COLORS

ORDER = ("size", "color", "material", "shape")
"""In which a caption names the attributes of an object."""

_OBJECT = re.compile(
    rf"\b(a|{'|'.join(NUMBERS[1:])}) "
    + "".join(f"(?:({'|'.join(ATTRIBUTES[name])}) )?" for name in ORDER[:3])
    + rf"({'|'.join(ATTRIBUTES['shape'])})s?\b"
)
_COUNT = re.compile(rf"\b({'|'.join(NUMBERS)}) objects?\b")
_FLOOR = re.compile(rf"\b({'|'.join(ROOM_COLORS)}) floor\b")


class Facts(NamedTuple):
    """What a caption says, or a scene holds."""

    count: int | None
    """The number of objects as it is stated."""
    floor: str | None
    objects: Counter
    """(size, colour, material, shape) of each object that is named, "" for what is left out."""


def facts_of_caption(text: str) -> Facts:
    text = text.lower()
    count, floor, objects = _COUNT.search(text), _FLOOR.search(text), Counter()
    for number, *attributes in _OBJECT.findall(text):
        objects[tuple(attributes)] += 1 if number == "a" else NUMBERS.index(number)
    return Facts(count and NUMBERS.index(count[1]), floor and floor[1], objects)


def facts_of_scenes(batch: dict) -> list[Facts]:
    """Of a batch with the fields "count", "floor" and "objects"."""
    objects = [Counter(tuple(one[name] for name in ORDER) for one in found) for found in batch["objects"]]
    return [Facts(*facts) for facts in zip(batch["count"].tolist(), batch["floor"], objects, strict=True)]


def fact_scores(said: Sequence[Facts], true: Sequence[Facts]) -> dict[str, float]:
    """How right statements are; what is not stated is wrong.

    Precision and recall are of objects over all scenes, equal ones counted as often as they are named; exact is the
    share of scenes with every object and no other.
    """
    pairs = list(zip(said, true, strict=True))
    scores = {
        "number stated": fmean(one.count == other.count for one, other in pairs),
        "number named": fmean(one.objects.total() == other.objects.total() for one, other in pairs),
        "floor": fmean(one.floor == other.floor for one, other in pairs),
    }
    for name, chosen in (("colour", (1,)), ("shape", (3,)), ("colour and shape", (1, 3)), ("object", (0, 1, 2, 3))):
        counts = [[_reduced(one.objects, chosen) for one in pair] for pair in pairs]
        right = sum((one & other).total() for one, other in counts)
        named, there = (sum(pair[k].total() for pair in counts) for k in (0, 1))
        scores[f"{name}, precision"], scores[f"{name}, recall"] = right / max(named, 1), right / max(there, 1)
        scores[f"{name}, exact"] = fmean(one == other for one, other in counts)
    return scores


def _reduced(objects: Counter, chosen: Sequence[int]) -> Counter:
    """Counts by some of the attributes alone."""
    found = Counter()
    for attributes, count in objects.items():
        found[tuple(attributes[k] for k in chosen)] += count
    return found
