"""How good the images of xAR generators are that were trained on the embedded scenes, by the colour that covers most.

    python -m zoo.tokenizers.xar.report NAME[=FILE] ... [--guidance 1 2] [--images 512] [--features vqgan-tiny]

For each generator and guidance: accuracy of the asked class by a small classifier that is trained here on real scenes,
and a Frechet distance to the real validation scenes on the features of a tokenizer of the zoo; for comparison both of
as many real training scenes. Writes report.json and, for each line, a picture with a column for each class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

import zoo
from zoo.commands.generate import image_generator
from zoo.data import Loader, scenes
from zoo.data.labels import COLOR_NAMES, dominant_color
from zoo.metrics.frechet import FrechetDistance

ROWS = 8
"""Images of each class in a picture."""
BATCH = 32


def real(split: str) -> tuple[Tensor, Tensor]:
    """All images of the scenes and their classes."""
    batches = list(Loader(scenes(split), batch_size=64, fields=["image", "objects"]))
    return torch.cat([b["image"] for b in batches]), torch.cat([dominant_color(b) for b in batches])


def classifier(images: Tensor, labels: Tensor, steps: int = 1000) -> nn.Module:
    """Four convolutions, trained with mirrored images."""
    torch.manual_seed(0)
    layers, inner = [], 3
    for width in (32, 64, 64, 128):
        layers += [nn.Conv2d(inner, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        inner = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, len(COLOR_NAMES)))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in track(range(steps), "classifier", transient=True):
        index = torch.randint(len(images), (64,))
        batch = images[index]
        batch = batch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(-1))
        loss = F.cross_entropy(network(batch), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return torch.cat([network(b).argmax(1) for b in images.split(64)]).eq(labels).float().mean().item()


def generated(name: str, weights: str | None, labels: Tensor, guidance: float) -> Tensor:
    """An image for each label; equal numbers are drawn for equal places whatever generates."""
    generator = zoo.load_generator(name, weights)
    space = zoo.load_tokenizer(generator.info.tokenizer)
    images = []
    for batch in track(torch.arange(len(labels)).split(BATCH), f"{name} {guidance}", transient=True):
        draws = [image_generator(0, i) for i in batch.tolist()]
        images.append(space.decode(generator.generate(labels[batch], guidance=guidance, generator=draws)))
    return torch.cat(images)


def frechet(images: Tensor, others: Tensor, features: str) -> float:
    metric = FrechetDistance(features)
    for batch, other in zip(images.split(BATCH), others.split(BATCH), strict=True):
        metric.update(batch, other)
    return next(iter(metric.compute().values())).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generators", nargs="+", metavar="NAME[=FILE]")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--features", default="vqgan-tiny")
    parser.add_argument("--output", type=Path, default=Path("outputs/xar-report"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (images, classes), (validation, its_classes) = real("train"), real("val")
    network = classifier(images, classes)
    count = min(args.images, len(validation))
    validation, its_classes = validation[:count], its_classes[:count]  # asked are the classes that the real ones have
    rows = []

    def add(title: str, images: Tensor, labels: Tensor) -> None:
        distance = frechet(images, validation, args.features)
        rows.append({"name": title, "accuracy": accuracy(network, images, labels), "distance": distance})

    rows.append({"name": "real, validation", "accuracy": accuracy(network, validation, its_classes), "distance": 0.0})
    add("real, training", images[:count], classes[:count])
    for given in args.generators:
        name, _, file = given.partition("=")
        for guidance in args.guidance:
            images = generated(name, file or None, its_classes, guidance)
            title = f"{Path(file).parent.name if file else name}, guidance {guidance:g}"
            add(title, images, its_classes)
            columns = [images[its_classes == c][:ROWS] for c in range(len(COLOR_NAMES))]
            columns = [F.pad(c, (*[0] * 6, 0, ROWS - len(c)), value=1.0) for c in columns]
            grid = make_grid(torch.stack(columns, dim=1).flatten(0, 1), nrow=len(COLOR_NAMES), pad_value=1.0)
            save_image(grid, args.output / f"{title.replace(', guidance ', '-')}.png")
    table = Table("", "accuracy of the class ↑", rf"FD\[{args.features}] to validation ↓")
    for row in rows:
        table.add_row(row["name"], f"{row['accuracy']:.1%}", f"{row['distance']:.4f}")
    report = {"images": count, "features": args.features, "rows": rows}
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
