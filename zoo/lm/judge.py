"""A judge of pictures of the embedded scenes: it names the objects that it finds, as captions do.

    python -m zoo.lm.judge --output judge.safetensors [--field image] [--epochs 6]

A small convolutional network, trained on the 4,096 real training scenes alone: for each place of a grid it says whether
an object has its middle there (focal loss on a map with a soft peak at the middle of each box, as in CenterNet, arXiv
1904.07850) and of which size, colour, material and shape it is; for the whole picture, of which colour the floor is.
Objects are the peaks of that map above a threshold, the one that counts best on the training scenes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from zoo import weights
from zoo.data import read_all, scenes
from zoo.data.labels import ATTRIBUTES
from zoo.data.render import ROOM_COLORS
from zoo.errors import ZooError
from zoo.lm.facts import ORDER, Facts, fact_scores, facts_of_scenes
from zoo.registry import resource
from zoo.tokenizer import config_fields, make_config

FLOORS = tuple(ROOM_COLORS)
FIELDS = {"image": 3, "depth": 1}
"""What is judged, and its channels."""


@dataclass(frozen=True)
class JudgeConfig:
    field: str = "image"
    """"image" or "depth"."""
    width: int = 32
    threshold: float = 0.3
    """Of a peak that is an object."""

    def __post_init__(self):
        if self.field not in FIELDS:
            raise ZooError(f"a judge looks at {' or '.join(FIELDS)}, got {self.field!r}.")


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width), nn.ReLU(), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


def convolution(before: int, after: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, size, stride, size // 2, bias=False), nn.BatchNorm2d(after))


class SceneJudge(nn.Module):
    """Pictures (B, C, 64, 64) in [0, 1] to what is on a grid of 32 x 32, and of which colour the floor is."""

    SIZE = 64
    """Side in pixels of the pictures that it was made for."""

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config, w = config, config.width
        self.stem = nn.Sequential(
            convolution(FIELDS[config.field], w // 2), nn.ReLU(), convolution(w // 2, w, stride=2)
        )
        self.fine = Residual(w)
        self.middle = nn.Sequential(convolution(w, 2 * w, stride=2), nn.ReLU(), Residual(2 * w), Residual(2 * w))
        self.coarse = nn.Sequential(convolution(2 * w, 2 * w, stride=2), nn.ReLU(), Residual(2 * w), Residual(2 * w))
        self.to_middle, self.to_fine = convolution(2 * w, 2 * w, size=1), convolution(2 * w, w, size=1)
        self.joined = Residual(w)
        self.heat = nn.Conv2d(w, 1, 3, padding=1)
        self.attributes = nn.ModuleDict({name: nn.Conv2d(w, len(ATTRIBUTES[name]), 3, padding=1) for name in ORDER})
        self.floor = nn.Linear(2 * w, len(FLOORS))
        nn.init.constant_(self.heat.bias, -4.0)  # objects are rare

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits: "heat" (B, 1, 32, 32), each attribute (B, K, 32, 32), "floor" (B, 8)."""
        fine = self.fine(F.relu(self.stem(2 * images - 1)))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        x = F.relu(middle + F.interpolate(self.to_middle(coarse), scale_factor=2.0))
        x = self.joined(F.relu(fine + F.interpolate(self.to_fine(x), scale_factor=2.0)))
        found = {name: head(x) for name, head in self.attributes.items()}
        return {"heat": self.heat(x), "floor": self.floor(coarse.mean((2, 3)))} | found

    @torch.no_grad()
    def describe(self, images: Tensor) -> list[Facts]:
        """What is seen in pictures (B, C, S, S) in [0, 1]; count and objects agree."""
        found = self(resized(images.float(), self.SIZE))
        peaks = peaks_of(found["heat"].sigmoid()) > self.config.threshold
        best = {name: found[name].argmax(1) for name in ORDER}
        described = []
        for i, floor in enumerate(found["floor"].argmax(1).tolist()):
            rows, columns = peaks[i, 0].nonzero(as_tuple=True)
            named = [[ATTRIBUTES[name][k] for k in best[name][i, rows, columns].tolist()] for name in ORDER]
            objects = Counter(zip(*named, strict=True))
            described.append(Facts(len(rows), FLOORS[floor], objects))
        return described


def peaks_of(heat: Tensor) -> Tensor:
    """A map (B, 1, h, w) with all but its local maxima set to 0."""
    return heat * (heat == F.max_pool2d(heat, 3, stride=1, padding=1))


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, C, S, S) to (B, C, side, side)."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


# Training


def targets(objects: Sequence[Sequence[dict]], side: int) -> dict[str, Tensor]:
    """Of B scenes: "heat" (B, 1, side, side), 1 at the cell of the middle of each box and falling off around it, and
    each attribute (B, side, side) int64 there, -1 elsewhere."""
    found = {name: torch.full((len(objects), side, side), -1) for name in ORDER}
    found["heat"] = torch.zeros(len(objects), 1, side, side)
    cells = torch.arange(side)
    for i, scene in enumerate(objects):
        for one in scene:
            left, top, right, bottom = one["box"]
            x, y = (min(int(side * middle), side - 1) for middle in ((left + right) / 2, (top + bottom) / 2))
            spread = max(side * min(right - left, bottom - top) / 6, 0.5)
            near = torch.exp(-((cells[:, None] - y).square() + (cells - x).square()) / (2 * spread**2))
            found["heat"][i, 0] = torch.maximum(found["heat"][i, 0], near)
            for name in ORDER:
                found[name][i, y, x] = ATTRIBUTES[name].index(one[name])
    return found


def loss_of(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    heat, near = found["heat"].clamp(-12, 12), wanted["heat"]
    share, middles = heat.sigmoid(), near == 1
    hit = (1 - share).square() * F.logsigmoid(heat) * middles
    miss = (1 - near).pow(4) * share.square() * F.logsigmoid(-heat) * ~middles
    loss = -(hit + miss).sum() / middles.sum() + F.cross_entropy(found["floor"], wanted["floor"])
    return loss + sum(F.cross_entropy(found[name], wanted[name], ignore_index=-1) for name in ORDER)


def augmented(
    images: Tensor, wanted: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half of the batches mirrored, all moved by some cells; a half blurred, as pictures of tokenizers are."""
    draws = torch.rand(2, generator=generator).tolist()
    down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
    maps = {name: one for name, one in wanted.items() if name != "floor"}
    if draws[0] < 0.5:
        images, maps = images.flip(-1), {name: one.flip(-1) for name, one in maps.items()}
    images = moved(images, 2 * down, 2 * right, edge=True)
    maps = {name: moved(one, down, right, fill=0 if name == "heat" else -1) for name, one in maps.items()}
    if draws[1] < 0.5:
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (kernel[:, None] * kernel).expand(images.shape[1], 1, 3, 3)
        images = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel, groups=images.shape[1])
    return images, maps | {"floor": wanted["floor"]}


def moved(maps: Tensor, down: int, right: int, fill: float = 0.0, edge: bool = False) -> Tensor:
    """Maps (..., h, w) moved; what comes in is `fill`, or the last row and column."""
    height, width = maps.shape[-2:]
    rows, columns = torch.arange(height) - down, torch.arange(width) - right
    result = maps[..., rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)]
    if edge:
        return result
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return result.masked_fill(~inside, fill)


def train_judge(
    train: dict, config: JudgeConfig, epochs: int = 6, batch_size: int = 32, lr: float = 4e-3
) -> SceneJudge:
    """A judge from a batch of all training scenes, with the fields of config.field, "objects" and "floor".

    The same on every run on one machine; the learning rate goes up in a tenth of the steps and down in the others.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    judge, images = SceneJudge(config).to(memory_format=torch.channels_last), train[config.field]
    wanted = targets(train["objects"], SceneJudge.SIZE // 2)
    wanted["floor"] = torch.tensor([FLOORS.index(floor) for floor in train["floor"]])
    optimizer = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.05, fused=True)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        starts = range(0, len(images) - batch_size + 1, batch_size)
        for start in track(starts, f"judge, epoch {epoch + 1} of {epochs}", transient=True):
            rows = order[start : start + batch_size]
            shown, maps = augmented(images[rows], {name: one[rows] for name, one in wanted.items()}, generator)
            loss = loss_of(judge(shown.contiguous(memory_format=torch.channels_last)), maps)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    judge = judge.eval()
    judge.config = make_config(config, {"threshold": best_threshold(judge, images, train["objects"])})
    return judge


@torch.no_grad()
def best_threshold(judge: SceneJudge, images: Tensor, objects: Sequence[Sequence[dict]]) -> float:
    """Above which peaks must be to be as many as there are objects, most often."""
    counts = torch.tensor([len(scene) for scene in objects])
    peaks = torch.cat([peaks_of(judge(rows)["heat"].sigmoid()).flatten(1) for rows in images.split(256)])
    tried = [number / 20 for number in range(2, 14)]
    right = [((peaks > one).sum(1) == counts).double().mean().item() for one in tried]
    return tried[right.index(max(right))]


# Files


def save_judge(judge: SceneJudge, path: str | Path) -> None:
    weights.save(path, judge.state_dict(), config_fields(judge.config))


def judge_file(field: str) -> Path:
    """The judge of "image" or "depth" in this repository."""
    return resource("checkpoints") / f"scene-judge-{field}.safetensors"


def load_judge(path: str | Path) -> SceneJudge:
    """The judge of a file of `save_judge`, in evaluation mode. Raises ZooError for any other file."""
    state, metadata = weights.read(path)
    judge = SceneJudge(make_config(JudgeConfig(), weights.description(metadata, path, "field", "threshold")))
    weights.load(judge, state, path)
    return judge.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--field", default="image", choices=FIELDS)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args(argv)
    fields = [args.field, "count", "objects", "floor"]
    train, val = (read_all(scenes(split), fields) for split in ("train", "val"))
    judge = train_judge(train, JudgeConfig(args.field), args.epochs)
    save_judge(judge, args.output)
    found = [facts for rows in val[args.field].split(64) for facts in judge.describe(rows)]
    for name, score in fact_scores(found, facts_of_scenes(val)).items():
        print(f"{name:28} {score:.3f}")
    print(f"{len(found)} validation scenes; threshold {judge.config.threshold}; the judge is in {args.output}")


if __name__ == "__main__":
    main()
