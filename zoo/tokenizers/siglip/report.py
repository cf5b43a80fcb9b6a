"""What a SigLIP encoder knows of the embedded scenes: retrieval, which words it minds, colours, counting by a probe.

    python -m zoo.tokenizers.siglip.report [--name siglip-tiny] [--weights FILE] [--output outputs/siglip-report]

Every number stands beside what could explain it away: chance, one who knows only the number of objects, the floor and
the colours, an untrained encoder of the same sizes, the picture of another scene, a thumbnail. Writes report.json.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zoo
from zoo.data import read_all, scenes
from zoo.data.labels import ATTRIBUTES, dominant_color
from zoo.data.questions import scene_labels
from zoo.data.render import NUMBERS, ROOM_COLORS
from zoo.files import write_json
from zoo.metrics.probe import probe_classes
from zoo.metrics.retrieval import Retrieval
from zoo.metrics.zeroshot import text_classifier
from zoo.tokenizers.siglip.encoder import SigLIPEncoder
from zoo.tokenizers.siglip.text import contradict, words
from zoo.tokenizers.siglip.training import SIDES

BATCH = 128
KS = (1, 5)
FLOORS = [[name] for name in ROOM_COLORS]
"""Lists of one: words of rooms are left alone, as "blue" in "a pale blue floor"."""


def retrieval(encoder: SigLIPEncoder, batch: dict) -> dict[str, float]:
    """Recall at k in both directions."""
    metric = Retrieval(KS)
    for images, i in zip(batch["image"].split(BATCH), range(0, len(batch["image"]), BATCH), strict=True):
        captions = batch["caption"][i : i + BATCH]
        metric.update(encoder.encode_image(images), encoder.encode_text(captions), captions)
    return {name: value.item() for name, value in metric.compute().items()}


def recall_of_one_who_knows(facts: list, k: int) -> float:
    """Expected recall at k of one who knows a fact about each scene and guesses among the scenes that share it."""
    sizes = Counter(facts)
    return sum(min(1, k / sizes[fact]) for fact in facts) / len(facts)


def minds_words(encoder: SigLIPEncoder, batch: dict, choices: tuple[str, ...]) -> dict[str, float]:
    """How often the true caption is nearer to its picture than one with a word changed.

    Control: the same to the picture of another scene, 0.5 where the text alone does not betray the change.
    """
    draws = random.Random(0)
    false = [
        contradict(caption, [choices, *FLOORS], [draws.random() for _ in range(3)]) for caption in batch["caption"]
    ]
    kept = [i for i, text in enumerate(false) if text]
    true = encoder.encode_text([batch["caption"][i] for i in kept])
    gap = true - encoder.encode_text([false[i] for i in kept])
    images = embed(encoder, batch["image"])
    return {
        "own picture": share((images[kept] * gap).sum(1) > 0),
        "control": share((images.roll(1, 0)[kept] * gap).sum(1) > 0),
        "captions": len(kept),
    }


def minds_sides(encoder: SigLIPEncoder, batch: dict) -> dict[str, float]:
    """How often a caption that names sides is nearer to its picture than to the mirror image; control: the others."""
    texts = encoder.encode_text(batch["caption"])
    gap = embed(encoder, batch["image"]) - embed(encoder, batch["image"].flip(-1))
    nearer = (gap * texts).sum(1) > 0
    sided = ~torch.tensor([SIDES.isdisjoint(words(caption)) for caption in batch["caption"]]) & (batch["count"] > 1)
    return {"own picture": share(nearer[sided]), "control": share(nearer[~sided]), "captions": int(sided.sum())}


def named_color(encoder: SigLIPEncoder, images: Tensor) -> Tensor:
    """(B,) the colour whose texts, of one object of every material and shape, are nearest on average."""
    (texts,) = (question.texts for question in scene_labels().questions if question.name == "colour of the largest")
    classifier = text_classifier(torch.stack([encoder.encode_text(one) for one in texts]))
    return (embed(encoder, images) @ classifier.T).argmax(1)


def embed(encoder: SigLIPEncoder, images: Tensor) -> Tensor:
    return torch.cat([encoder.encode_image(one) for one in images.split(BATCH)])


def mean_features(encoder: SigLIPEncoder, images: Tensor) -> Tensor:
    return torch.cat([encoder.features(one).mean(1) for one in images.split(BATCH)])


def share(right: Tensor) -> float:
    return right.double().mean().item()


def retrieval_table(encoder: SigLIPEncoder, untrained: SigLIPEncoder, train: dict, val: dict) -> dict:
    seen = {name: value[: len(val["image"])] for name, value in train.items()}
    table = {
        "encoder": retrieval(encoder, val),
        "encoder, as many training scenes": retrieval(encoder, seen),
        "untrained": retrieval(untrained, val),
    }
    counts_floors = list(zip(val["count"].tolist(), val["floor"], strict=True))
    colors = [tuple(sorted(thing["color"] for thing in objects)) for objects in val["objects"]]
    for name, facts in (
        ("knows count, floor and colours", list(zip(counts_floors, colors, strict=True))),
        ("knows count and floor", counts_floors),
        ("chance", [None] * len(val["image"])),
    ):
        table[name] = {key: recall_of_one_who_knows(facts, int(key[-1])) for key in table["encoder"]}
    return table


def color_table(encoder: SigLIPEncoder, untrained: SigLIPEncoder, val: dict) -> dict:
    colors = dominant_color(val)
    return {
        "encoder": {"accuracy": share(named_color(encoder, val["image"]) == colors)},
        "untrained": {"accuracy": share(named_color(untrained, val["image"]) == colors)},
        "always the most frequent": {"accuracy": share(colors == colors.mode().values)},
    }


def count_table(encoder: SigLIPEncoder, untrained: SigLIPEncoder, train: dict, val: dict) -> dict:
    views = {
        "encoder, mean of features": lambda images: mean_features(encoder, images),
        "encoder, embedding": lambda images: embed(encoder, images),
        "untrained, mean of features": lambda images: mean_features(untrained, images),
        "thumbnail of 8 x 8 pixels": lambda images: F.adaptive_avg_pool2d(images, 8).flatten(1),
        "mean colour": lambda images: images.mean((2, 3)),
    }
    guesses = {
        name: probe_classes(view(train["image"]), train["count"] - 1, view(val["image"])) + 1
        for name, view in views.items()
    } | {"always the most frequent": train["count"].mode().values}
    return {name: {"accuracy": share(guess == val["count"])} for name, guess in guesses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="siglip-tiny")
    parser.add_argument("--weights")
    parser.add_argument("--output", type=Path, default=Path("outputs/siglip-report"))
    args = parser.parse_args()
    encoder = zoo.load_encoder(args.name, args.weights)
    torch.manual_seed(0)
    untrained = type(encoder)(encoder.config).eval()
    fields = ["image", "caption", "objects", "count", "floor"]
    train, val = (read_all(scenes(split), fields, image_size=encoder.config.image_size) for split in ("train", "val"))

    tables = {
        "retrieval": retrieval_table(encoder, untrained, train, val),
        "true caption before one with a word changed": {
            name: minds_words(encoder, val, choices) for name, choices in (ATTRIBUTES | {"number": NUMBERS[1:]}).items()
        }
        | {"left and right (mirrored picture)": minds_sides(encoder, val)},
        "colour of the largest, named by texts": color_table(encoder, untrained, val),
        "number of objects by linear probe": count_table(encoder, untrained, train, val),
    }
    for title, rows in tables.items():
        columns = [key.replace("_recall", "").replace("_", " ") for key in next(iter(rows.values()))]
        table = Table(title, *columns)
        for name, row in rows.items():
            table.add_row(name, *(f"{value:.3f}" if type(value) is float else str(value) for value in row.values()))
        Console(highlight=False).print(table)
    scenes_of = {"scenes": len(val["caption"]), "different captions": len(set(val["caption"]))}
    scenes_of["captions also in training"] = len(set(val["caption"]) & set(train["caption"]))
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "report.json", {"name": args.name} | scenes_of | tables)
    print(f"{scenes_of}; report.json is in {args.output}")


if __name__ == "__main__":
    main()
