import zlib

import numpy as np
import torch
from torchmetrics import Metric

from zoo.metrics.base import Row

SIDE = 336
"""Photos and maps of the paper are squashed to this many pixels a side; distances and coordinates are in these."""
COUNTS = (2, 3, 4, 5)


def markers(depth: np.ndarray, key: str, count: int = max(COUNTS)) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of up to `count` places in a map (H, W) in [0, 1], drawn as AURORA marks its photos.

    Coordinates are uniform in 0..300 of 336; the value is not 0; any two places are at least 20 of 336 apart and
    their values at least 20 of 255. The same key draws the same places; the first k are the question of k markers.
    """
    # RandomState, since its stream never changes between versions of NumPy
    places = np.random.RandomState(zlib.crc32(key.encode())).randint(0, 301, (512, 2))
    rows, columns = ((places + 0.5) * depth.shape / SIDE).astype(int).T
    values = depth[rows, columns] * 255
    allowed = values > 0
    chosen = []
    while len(chosen) < count and allowed.any():
        chosen.append(first := allowed.argmax())
        far = np.hypot(*(places - places[first]).T) >= 20
        allowed &= far & (np.abs(values - values[first]) >= 20)
    return rows[chosen], columns[chosen]


class MarkerOrder(Metric):
    """The paper's question to a map: which of k = 2..5 marked places is nearest (has the largest value)?

    Right where the argmax of the decoded map over the markers is that of the input (AURORA, section 4.2: accuracy
    of the tokenizer). Maps without room for k markers are not asked; chance is 1/k.
    """

    rows = tuple(Row(f"order_{k}", f"nearest of {k} (chance {1 / k:.0%})", "higher", ".1%") for k in COUNTS)
    kinds = ("depth",)
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("right", torch.zeros(len(COUNTS), dtype=torch.float64), "sum")
        self.add_state("asked", torch.zeros(len(COUNTS), dtype=torch.float64), "sum")

    def update(self, prediction, target, keys):
        """Maps (B, 1, H, W) in [0, 1] and the B names of the images, which seed the markers."""
        for decoded, true, key in zip(prediction[:, 0].cpu().numpy(), target[:, 0].cpu().numpy(), keys, strict=True):
            places = markers(true, key)
            for i, k in enumerate(COUNTS):
                if len(places[0]) >= k:
                    self.asked[i] += 1
                    self.right[i] += int(decoded[places][:k].argmax() == true[places][:k].argmax())

    def compute(self):
        values = {}
        for k, right, asked in zip(COUNTS, self.right, self.asked, strict=True):
            name = f"order_{k}"
            values |= {
                name: right / asked,
                f"{name}_images": asked,
                f"{name}_chance": torch.tensor(1 / k, dtype=torch.float64),
            }
        return values
