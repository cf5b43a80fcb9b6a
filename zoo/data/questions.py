"""What can be asked about the images of a data set, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from zoo.data.labels import ATTRIBUTES, COLOR_NAMES, class_field, dominant_color, values_present
from zoo.data.render import MATERIALS, MAX_OBJECTS, ROOM_COLORS, SHAPES, amount
from zoo.errors import ZooError


@dataclass(frozen=True)
class Question:
    """Something to be read off an image."""

    name: str
    fields: tuple[str, ...]
    """Of a batch, that the answers come from."""
    answers: Callable[[dict], Tensor]
    """A batch to (B,) int64, which of K classes each image is of, or to (B, K) bool, which of K things it has."""
    texts: Sequence[Sequence[str]] = ()
    """As many texts for each of the K classes, (K, T); none where only a probe can be asked."""


@dataclass(frozen=True)
class Labels:
    """All that is known about the images of a data set."""

    questions: Sequence[Question] = ()
    captions: bool = False
    """Whether each sample has a field "caption" that describes it."""


def scene_labels(captions: bool = True) -> Labels:
    """Of the embedded scenes: the number of objects, the colour that covers most, the attributes that objects have."""
    counts = [
        [f"A picture of {amount(number, 'object')} on a {floor} floor." for floor in ROOM_COLORS]
        for number in range(1, MAX_OBJECTS + 1)
    ]
    colors = [
        [
            f"A picture of one object on a white floor: a large {color} {material} {shape}."
            for material, shape in product(MATERIALS, SHAPES)
        ]
        for color in COLOR_NAMES
    ]
    present = [Question(f"{name}s", ("objects",), partial(values_present, attribute=name)) for name in ATTRIBUTES]
    return Labels(
        [
            Question("number of objects", ("count",), lambda batch: torch.as_tensor(batch["count"]) - 1, counts),
            Question("colour of the largest", ("objects",), dominant_color, colors),
            *present,
        ],
        captions,
    )


def class_labels(
    classes: list[str] | str | None = None, templates: list[str] | str = ("{}",), captions: bool = False
) -> Labels:
    """Of samples with a field "class", a number.

    Args:
        classes: names of the classes 0, 1, ..., a list or a file with one on each line; None: for a probe only.
        templates: texts in which {} stands for a name, likewise.
        captions: whether the samples have a field "caption" as well.

    Raises ZooError for files that are not there, empty lists, and a template without {}.
    """
    if classes is None:
        return Labels([Question("class", ("class",), class_field)], captions)
    templates = lines("templates", templates)
    for template in templates:
        if "{}" not in template:
            raise ZooError(f"labels.templates has '{template}', without a {{}} where the name of a class belongs.")
    texts = [[template.replace("{}", name) for template in templates] for name in lines("classes", classes)]
    return Labels([Question("class", ("class",), class_field, texts)], captions)


def lines(name: str, value: Sequence[str] | str) -> list[str]:
    """A list of texts, or the lines of a file that are not empty. Raises ZooError where there are none."""
    if isinstance(value, str):
        try:
            value = Path(value).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ZooError(f"labels.{name} must be a list or a text file of one on each line ({error}).") from error
    found = [str(one).strip() for one in value if str(one).strip()]
    if not found:
        raise ZooError(f"labels.{name} is empty; give at least one.")
    return found
