"""Classes of images, from what a batch says about them."""

import torch
from torch import Tensor

from zoo.data.render import COLORS, MATERIALS, SHAPES, SIZES
from zoo.errors import ZooError

COLOR_NAMES = tuple(COLORS)
ATTRIBUTES = {"color": COLOR_NAMES, "material": MATERIALS, "shape": SHAPES, "size": tuple(SIZES)}
"""Values of each attribute of an object."""


def class_field(batch: dict) -> Tensor:
    """(B,) int64: the field "class" of the samples. Raises ZooError when it is not there, or no number."""
    if "class" not in batch:
        raise ZooError(f"the batch has no field 'class' to train on, but {sorted(batch)}; add it to data.fields.")
    try:
        return torch.as_tensor(batch["class"])
    except (TypeError, ValueError) as error:
        raise ZooError(f"the field 'class' must hold numbers 0, 1, ..., got {batch['class'][0]!r}.") from error


def objects_of(batch: dict) -> list[list[dict]]:
    """The field "objects" of the scenes."""
    if "objects" not in batch:
        raise ZooError(f"the batch has no field 'objects', but {sorted(batch)}; add it to data.fields.")
    return batch["objects"]


def values_present(batch: dict, attribute: str) -> Tensor:
    """(B, K) bool: which of the K values of an attribute (a key of ATTRIBUTES) some object of each scene has."""
    found = [{one[attribute] for one in objects} for objects in objects_of(batch)]
    return torch.tensor([[value in values for value in ATTRIBUTES[attribute]] for values in found])


def dominant_color(batch: dict) -> Tensor:
    """(B,) int64: of a scene's objects, the colour (by its place in COLOR_NAMES) that covers most of the picture."""
    classes = []
    for objects in objects_of(batch):
        area = dict.fromkeys(COLOR_NAMES, 0.0)
        for found in objects:
            area[found["color"]] += found["visible"]
        classes.append(max(range(len(COLOR_NAMES)), key=lambda i, area=area: area[COLOR_NAMES[i]]))
    return torch.tensor(classes)
