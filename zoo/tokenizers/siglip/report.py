"""What a SigLIP encoder knows of the embedded scenes: retrieval, colours without training, counting by a linear probe.

    python -m zoo.tokenizers.siglip.report [--name siglip-tiny] [--weights FILE] [--output outputs/siglip-report]

Every number stands beside what explains it away: chance, one who knows only the number of objects and the floor, an
untrained encoder of the same sizes, a thumbnail of the picture. Writes report.json.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zoo
from zoo.data import Loader, scenes
from zoo.data.labels import COLOR_NAMES, dominant_color
from zoo.data.render import MATERIALS, SHAPES
from zoo.metrics.retrieval import Retrieval
from zoo.tokenizers.siglip.encoder import SigLIPEncoder

BATCH = 128
KS = (1, 5)


def read(split: str, image_size: int) -> dict:
    """All scenes of a split as one batch."""
    fields = ["image", "caption", "objects", "count", "floor"]
    batches = list(Loader(scenes(split), batch_size=BATCH, fields=fields, image_size=image_size))
    lists = {name: [value for batch in batches for value in batch[name]] for name in fields[1:3] + fields[4:]}
    counts = torch.cat([torch.as_tensor(batch["count"]) for batch in batches])
    return lists | {"image": torch.cat([batch["image"] for batch in batches]), "count": counts}


def retrieval(encoder: SigLIPEncoder, batch: dict) -> dict[str, float]:
    """Recall at k in both directions."""
    metric = Retrieval(KS)
    for images, i in zip(batch["image"].split(BATCH), range(0, len(batch["image"]), BATCH), strict=True):
        captions = batch["caption"][i : i + BATCH]
        metric.update(encoder.encode_image(images), encoder.encode_text(captions), captions)
    return {name: value.item() for name, value in metric.compute().items()}


def recall_by_count_and_floor(batch: dict, k: int) -> float:
    """Expected recall of one who knows the number of objects and the floor's colour, and guesses among what is left."""
    pairs = list(zip(batch["count"].tolist(), batch["floor"], strict=True))
    sizes = Counter(pairs)
    return sum(min(1, k / sizes[pair]) for pair in pairs) / len(pairs)


def named_color(encoder: SigLIPEncoder, images: Tensor) -> Tensor:
    """(B,) the colour whose texts, of one object of every material and shape, are nearest on average."""
    texts = [
        f"A picture of one object on a white floor: a large {color} {material} {shape}."
        for color, material, shape in product(COLOR_NAMES, MATERIALS, SHAPES)
    ]
    prototypes = F.normalize(encoder.encode_text(texts).unflatten(0, (len(COLOR_NAMES), -1)).mean(1), dim=-1)
    return (embed(encoder, images) @ prototypes.T).argmax(1)


def embed(encoder: SigLIPEncoder, images: Tensor) -> Tensor:
    return torch.cat([encoder.encode_image(one) for one in images.split(BATCH)])


def mean_features(encoder: SigLIPEncoder, images: Tensor) -> Tensor:
    return torch.cat([encoder.features(one).mean(1) for one in images.split(BATCH)])


def probe(train: Tensor, labels: Tensor, test: Tensor, ridge: float = 1e-2) -> Tensor:
    """Classes of test rows by ridge regression on one-hot labels; features are standardised, a constant is added."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    x, rows = (F.pad((one - mean) / std, (0, 1), value=1.0).double() for one in (train, test))
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return (rows @ torch.linalg.solve(gram, x.T @ F.one_hot(labels).double() / len(x))).argmax(1)


def share(right: Tensor) -> float:
    return right.double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="siglip-tiny")
    parser.add_argument("--weights")
    parser.add_argument("--output", type=Path, default=Path("outputs/siglip-report"))
    args = parser.parse_args()
    encoder = zoo.load_encoder(args.name, args.weights)
    torch.manual_seed(0)
    untrained = type(encoder)(encoder.config).eval()
    train, val = (read(split, encoder.config.image_size) for split in ("train", "val"))

    scenes_seen = {name: value[: len(val["image"])] for name, value in train.items()}
    report = {"name": args.name, "scenes": len(val["caption"]), "different_captions": len(set(val["caption"]))}
    report["captions_also_in_training"] = len(set(val["caption"]) & set(train["caption"]))
    report["retrieval"] = {
        "encoder": retrieval(encoder, val),
        "encoder, as many training scenes": retrieval(encoder, scenes_seen),
        "untrained": retrieval(untrained, val),
    }
    for name, recall in (
        ("knows count and floor", lambda k: recall_by_count_and_floor(val, k)),
        ("chance", lambda k: k / report["scenes"]),
    ):
        report["retrieval"][name] = {key: recall(int(key[-1])) for key in report["retrieval"]["encoder"]}

    colors = dominant_color(val)
    report["colour of the largest, named by texts"] = {
        "encoder": share(named_color(encoder, val["image"]) == colors),
        "untrained": share(named_color(untrained, val["image"]) == colors),
        "always the most frequent": share(colors == colors.mode().values),
    }
    views = {
        "encoder, mean of features": lambda images: mean_features(encoder, images),
        "encoder, embedding": lambda images: embed(encoder, images),
        "untrained, mean of features": lambda images: mean_features(untrained, images),
        "thumbnail of 8 x 8 pixels": lambda images: F.adaptive_avg_pool2d(images, 8).flatten(1),
        "mean colour": lambda images: images.mean((2, 3)),
    }
    report["number of objects by linear probe"] = {
        name: share(probe(view(train["image"]), train["count"] - 1, view(val["image"])) == val["count"] - 1)
        for name, view in views.items()
    } | {"always the most frequent": share(val["count"] == train["count"].mode().values)}

    console = Console(highlight=False)
    recalls = Table(f"retrieval among {report['scenes']}", *report["retrieval"]["encoder"])
    for name, row in report["retrieval"].items():
        recalls.add_row(name, *(f"{value:.3f}" for value in row.values()))
    console.print(recalls)
    for title in ("colour of the largest, named by texts", "number of objects by linear probe"):
        table = Table(title, "accuracy")
        for name, value in report[title].items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"report.json is in {args.output}")


if __name__ == "__main__":
    main()
