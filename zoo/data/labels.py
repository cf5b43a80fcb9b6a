"""Classes of images, from what a batch says about them."""

import torch
from torch import Tensor

from zoo.data.render import COLORS
from zoo.errors import ZooError

COLOR_NAMES = tuple(COLORS)


def class_field(batch: dict) -> Tensor:
    """(B,) int64: the field "class" of the samples."""
    if "class" not in batch:
        raise ZooError(f"the batch has no field 'class' to train on, but {sorted(batch)}; add it to data.fields.")
    return torch.as_tensor(batch["class"])


def dominant_color(batch: dict) -> Tensor:
    """(B,) int64: of a scene's objects, the colour (by its place in COLOR_NAMES) that covers most of the picture."""
    if "objects" not in batch:
        raise ZooError(f"the batch has no field 'objects', but {sorted(batch)}; add it to data.fields.")
    classes = []
    for objects in batch["objects"]:
        area = dict.fromkeys(COLOR_NAMES, 0.0)
        for found in objects:
            area[found["color"]] += found["visible"]
        classes.append(max(range(len(COLOR_NAMES)), key=lambda i, area=area: area[COLOR_NAMES[i]]))
    return torch.tensor(classes)
