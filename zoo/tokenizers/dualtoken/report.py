"""What the ids of a DualToken tokenizer keep of the embedded scenes: pixels, and what the tower knew of meaning.

    python -m zoo.tokenizers.dualtoken.report [--name dualtoken-tiny] [--weights FILE ...] [--output DIR]

Each file of weights (by default the registered one) is read at 1, 2, ... levels of its residual quantizers: PSNR of
reconstructions, image-text retrieval with embeddings from quantised features and with those of the tower as it was
before training (the teacher), and how near the two embeddings are. Files of several trainings stand below one another,
which is how one codebook for both tasks compares with two at equal bits. Writes report.json and levels.png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.utils import make_grid, save_image

import zoo
from zoo.data import read_all, scenes
from zoo.files import write_json
from zoo.metrics.retrieval import recalls_at_one
from zoo.tokenizers.dualtoken.tokenizer import DualTokenTokenizer

BATCH = 64
TEACHER = "siglip-tiny"


def scores(tokenizer: DualTokenTokenizer, levels: int, batch: dict, texts: Tensor, taught: Tensor) -> dict[str, float]:
    """All numbers of a tokenizer whose images have that many ids of each stream at a place."""
    embeddings, errors = [], []
    for images in batch["image"].split(BATCH):
        tokens = tokenizer.encode(images, levels=levels)
        embeddings.append(tokenizer.embedding_of(tokens))
        errors.append((tokenizer.decode(tokens) - images).square().flatten(1).mean(1))
    embedded = torch.cat(embeddings)
    bits = sum(
        tokenizer.info.max_tokens * sum(map(math.log2, stream.sizes[:levels]))
        for stream in tokenizer.config.streams.values()
    )
    psnr = (-10 * torch.cat(errors).log10()).mean().item()
    cosine = F.cosine_similarity(embedded, taught).mean().item()
    return (
        {"bits": bits, "psnr": psnr} | recalls_at_one(embedded, texts, batch["caption"]) | {"cosine to teacher": cosine}
    )


def pictures(tokenizer: DualTokenTokenizer, images: Tensor) -> Tensor:
    """A grid: images, then a row of reconstructions for each number of levels."""
    most = max(tokenizer.info.levels.values())
    rows = [images, *(tokenizer.reconstruct(images, levels=levels) for levels in range(1, most + 1))]
    return make_grid(torch.cat(rows), nrow=len(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="dualtoken-tiny")
    parser.add_argument("--weights", nargs="+", default=[None])
    parser.add_argument("--output", type=Path, default=Path("outputs/dualtoken-report"))
    args = parser.parse_args()
    tokenizers = [zoo.load_tokenizer(args.name, weights) for weights in args.weights]
    teacher = zoo.load_encoder(TEACHER)
    val = read_all(scenes("val"), ["image", "caption"], teacher.config.image_size)
    taught, texts = (
        torch.cat([embed(val[field][i : i + BATCH]) for i in range(0, len(val["image"]), BATCH)])
        for embed, field in ((teacher.encode_image, "image"), (teacher.encode_text, "caption"))
    )

    rows = [{"weights": f"teacher, {TEACHER}", "levels": ""} | recalls_at_one(taught, texts, val["caption"])]
    for tokenizer, weights in zip(tokenizers, args.weights, strict=True):
        most = max(tokenizer.info.levels.values())
        for levels in track(range(1, most + 1), f"{weights or args.name}", transient=True):
            found = scores(tokenizer, levels, val, texts, taught)
            rows.append({"weights": str(weights or args.name), "levels": levels} | found)
    table = Table(*max(rows, key=len))
    for row in rows:
        cells = (row.get(str(column.header), "") for column in table.columns)
        table.add_row(*(f"{cell:.3f}" if type(cell) is float else str(cell) for cell in cells))
    Console(highlight=False).print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "report.json", {"name": args.name, "rows": rows})
    save_image(pictures(tokenizers[0], val["image"][:8]), args.output / "levels.png")
    print(f"{len(val['image'])} scenes; report.json and levels.png are in {args.output}")


if __name__ == "__main__":
    main()
