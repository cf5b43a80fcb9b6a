"""How good the images of xAR generators are that were trained on the embedded scenes, by the colour that covers most.

    python -m zoo.tokenizers.xar.report NAME[=FILE] ... [--images 512] [--features aurora-tiny] [--output DIR]

For each generator: accuracy of the asked class by a small classifier that is trained here on real scenes, and a Frechet
distance to the real validation scenes on the features of a tokenizer of the zoo. Writes report.json and, for each
generator, a picture with a column for each class.
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
from zoo.tokenizer import Tokens

ROWS = 8
"""Images of each class in a picture."""


def real(split: str) -> tuple[Tensor, Tensor]:
    """All images of the scenes and their classes."""
    batches = list(Loader(scenes(split), batch_size=64, fields=["image", "objects"]))
    return torch.cat([b["image"] for b in batches]), torch.cat([dominant_color(b) for b in batches])


def classifier(images: Tensor, labels: Tensor, steps: int = 600) -> nn.Module:
    """Four convolutions, trained with mirrored images."""
    torch.manual_seed(0)
    layers, inner = [], 3
    for width in (32, 64, 64, 128):
        layers += [nn.Conv2d(inner, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        inner = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, len(COLOR_NAMES)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
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


def generated(name: str, weights: str | None, count: int, guidance: float | None) -> tuple[Tensor, Tensor]:
    """Images of all classes in equal numbers, and the classes."""
    generator = zoo.load_generator(name, weights)
    space = zoo.load_tokenizer(generator.info.tokenizer)
    labels = torch.arange(count) * len(generator.info.classes) // count
    images = []
    for batch in track(torch.arange(count).split(32), name, transient=True):
        latents = generator.sample(
            labels[batch], guidance=guidance, generator=[image_generator(0, i) for i in batch.tolist()]
        )
        tokens = Tokens(latents={"image": latents.flatten(2).transpose(1, 2)}, grid=tuple(latents.shape[2:]))
        images.append(space.decode(tokens))
    return torch.cat(images), labels


def frechet(images: Tensor, others: Tensor, features: str) -> float:
    metric = FrechetDistance(features=features)
    count = min(len(images), len(others))
    metric.update(images[:count], others[:count])
    return next(iter(metric.compute().values())).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generators", nargs="+", metavar="NAME[=FILE]")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--features", default="aurora-tiny")
    parser.add_argument("--output", type=Path, default=Path("outputs/xar-report"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    validation, classes = real("val")
    network = classifier(*real("train"))
    rows = {"real scenes": {"accuracy": accuracy(network, validation, classes)}}
    order = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))
    for given in args.generators:
        name, _, file = given.partition("=")
        images, labels = generated(name, file or None, args.images, args.guidance)
        mixed = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        rows[given] = {
            "accuracy": accuracy(network, images, labels),
            f"FD[{args.features}]": frechet(mixed, validation[order], args.features),
        }
        shown = torch.stack([images[labels == c][:ROWS] for c in range(len(COLOR_NAMES))], dim=1).flatten(0, 1)
        stem = Path(file).parent.name if file else name
        save_image(make_grid(shown, nrow=len(COLOR_NAMES)), args.output / f"{stem}.png")
    table = Table("", "accuracy of the class ↑", f"FD[{args.features}] ↓")
    for given, row in rows.items():
        distance = row.get(f"FD[{args.features}]")
        table.add_row(given, f"{row['accuracy']:.1%}", "" if distance is None else f"{distance:.5f}")
    (args.output / "report.json").write_text(json.dumps({"images": args.images, "rows": rows}, indent=2) + "\n")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
