"""How good the images of xAR generators are that were trained on the embedded scenes, by the colour that covers most.

    python -m zoo.tokenizers.xar.report NAME[=FILE] ... [--guidance 1 2] [--images 512] [--output DIR]

For each generator and guidance: accuracy of the asked class by a small classifier that is trained here on the real
training scenes, and the Frechet distance to these scenes on the 128 features before its last layer. For comparison both
of real validation scenes, of these blurred, and of what the autoencoder makes of them. The classes asked for are those
of the validation scenes. Writes report.json and, for each line of a generator, a picture with a column for each class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.utils import make_grid, save_image

import zoo
from zoo.commands.generate import image_generator
from zoo.data import read_all, scenes
from zoo.data.labels import COLOR_NAMES, dominant_color
from zoo.files import write_json

ROWS = 8
"""Images of each class in a picture."""
BATCH = 32


def real(split: str) -> tuple[Tensor, Tensor]:
    """All images of the scenes and their classes."""
    batch = read_all(scenes(split), ["image", "objects"])
    return batch["image"], dominant_color(batch)


def classifier(images: Tensor, labels: Tensor, steps: int = 1000) -> nn.Sequential:
    """Four convolutions and a linear layer, trained with mirrored images."""
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


def distance_to(images: Tensor, network: nn.Sequential) -> FrechetInceptionDistance:
    """A metric that knows the features of the real images."""
    features = network[:-1]
    features.num_features = network[-1].in_features
    metric = FrechetInceptionDistance(features, reset_real_features=False)
    for batch in images.split(BATCH):
        metric.update(batch, real=True)
    return metric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generators", nargs="+", metavar="NAME[=FILE]")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("outputs/xar-report"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train, (validation, labels) = real("train"), real("val")
    network = classifier(*train)
    metric = distance_to(train[0], network)
    validation, labels = validation[: args.images], labels[: args.images]
    rows = []

    def add(title: str, images: Tensor) -> None:
        metric.reset()
        for batch in images.split(BATCH):
            metric.update(batch, real=False)
        rows.append({"name": title, "accuracy": accuracy(network, images, labels), "distance": metric.compute().item()})

    space = zoo.load_tokenizer(zoo.load_generator(args.generators[0].partition("=")[0]).info.tokenizer)
    add("real scenes", validation)
    add(f"real scenes through {space.info.name}", torch.cat([space.reconstruct(b) for b in validation.split(BATCH)]))
    add("real scenes, blurred by 5 x 5", F.avg_pool2d(validation, 5, 1, 2, count_include_pad=False))
    for given in args.generators:
        name, _, file = given.partition("=")
        for guidance in args.guidance:
            images = generated(name, file or None, labels, guidance)
            title = f"{Path(file).parent.name if file else name}, guidance {guidance:g}"
            add(title, images)
            columns = [images[labels == c][:ROWS] for c in range(len(COLOR_NAMES))]
            columns = [F.pad(c, (*[0] * 6, 0, ROWS - len(c)), value=1.0) for c in columns]
            grid = make_grid(torch.stack(columns, dim=1).flatten(0, 1), nrow=len(COLOR_NAMES), pad_value=1.0)
            save_image(grid, args.output / f"{title.replace(', guidance ', '-')}.png")
    table = Table("", "accuracy of the class ↑", "Frechet distance ↓")
    for row in rows:
        table.add_row(row["name"], f"{row['accuracy']:.1%}", f"{row['distance']:.3f}")
    write_json(args.output / "report.json", {"images": len(labels), "rows": rows})
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
