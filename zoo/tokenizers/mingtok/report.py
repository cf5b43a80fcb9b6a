"""What a MingTok tokenizer understands of the embedded scenes: linear probes on features, latents and pixels.

    python -m zoo.tokenizers.mingtok.report [--name mingtok-tiny] [--weights FILE] [--output outputs/mingtok-report]

Each view of a picture is read by one linear map that is fitted on the training scenes and judged on the validation
scenes: averaged over patches ("mean") and with all patches side by side ("whole"). Accuracy for the number of objects
and the colour that covers most; for attributes the area under the ROC curve of "some object has this value", averaged
over values (0.5: chance). For comparison: pixels, a tokenizer that was never trained, the teacher. Writes report.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import zoo
from zoo.data import read_all, scenes
from zoo.data.questions import scene_labels
from zoo.files import write_json
from zoo.metrics.probe import most_frequent, probe

BATCH = 64
TEACHER = "siglip-tiny"


def scores(view: Callable[[Tensor], Tensor], train: dict, val: dict, mean: bool) -> dict[str, float]:
    """How well each target is read off a view of the pictures, (B, N, D), by one linear map."""
    rows = []
    for batch in (train, val):
        seen = [view(images) for images in batch["image"].split(BATCH)]
        rows.append(torch.cat([one.mean(1) if mean else one.flatten(1) for one in seen]))
    return probe(rows[0], targets(train), rows[1], targets(val))


def targets(batch: dict) -> dict[str, Tensor]:
    return {question.name: question.answers(batch) for question in scene_labels().questions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="mingtok-tiny")
    parser.add_argument("--weights")
    parser.add_argument("--output", type=Path, default=Path("outputs/mingtok-report"))
    args = parser.parse_args()
    tokenizer = zoo.load_tokenizer(args.name, args.weights)
    torch.manual_seed(0)
    untrained, teacher = type(tokenizer)(tokenizer.config).eval(), zoo.load_encoder(TEACHER)
    fields = ["image", "objects", "count"]
    train, val = (read_all(scenes(split), fields, tokenizer.config.image_size) for split in ("train", "val"))

    views = {
        "semantic features": tokenizer.features,
        "latents": lambda images: tokenizer.encode(images).latents["image"],
        "pixels": lambda images: F.pixel_unshuffle(images, tokenizer.config.patch_size).flatten(2).mT,
        "features of an untrained tokenizer": untrained.features,
        f"teacher, {TEACHER}": teacher.features,
    }
    rows = [
        {"view": name, "of patches": "mean" if mean else "whole"} | scores(view, train, val, mean)
        for mean in (True, False)
        for name, view in track(views.items(), "probes, " + ("mean" if mean else "whole"), transient=True)
    ]
    rows.append({"view": "always the most frequent"} | most_frequent(targets(train), targets(val)))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.3f}" if type(v) is float else v for v in (row.get(key, "") for key in rows[0])))
    Console(highlight=False).print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "report.json", {"name": args.name, "rows": rows})
    print(f"{len(train['image'])} scenes to fit on, {len(val['image'])} to judge; report.json is in {args.output}")


if __name__ == "__main__":
    main()
