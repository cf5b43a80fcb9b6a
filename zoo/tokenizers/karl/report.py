"""What a KARL does with the embedded scenes: error against tokens, tokens against objects, and pictures of both.

    python -m zoo.tokenizers.karl.report [--name karl-tiny] [--weights FILE] [--output DIR]

Writes adaptivity.json, curves.png and qualities.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

import zoo
from zoo.data import Loader, scenes
from zoo.files import write_json
from zoo.tokenizers.karl.tokenizer import KarlTokenizer

QUALITIES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.12)
SHOWN = (0.03, 0.05, 0.09)
BATCH = 64


def measure(tokenizer: KarlTokenizer, images: Tensor, **settings) -> dict[str, Tensor]:
    """Tokens, mean absolute error and PSNR of each image."""
    found = {"tokens": [], "error": [], "psnr": []}
    for batch in images.split(BATCH):
        tokens = tokenizer.encode(batch, sample_posterior=False, **settings)
        difference = (tokenizer.decode(tokens) - batch).flatten(1)
        found["tokens"].append(tokens.lengths.float())
        found["error"].append(difference.abs().mean(1))
        found["psnr"].append(-10 * difference.square().mean(1).clamp(min=1e-10).log10())
    return {name: torch.cat(values) for name, values in found.items()}


def draw_curves(path: Path, chosen: dict, forced: dict, objects: Tensor) -> None:
    """Error against tokens, and tokens against objects."""
    figure = Figure((9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, rows, style in (("first n tokens", forced, "o-"), ("as many as KARL chooses", chosen, "s--")):
        points = [(row["tokens"].mean().item(), row["error"].mean().item()) for row in rows.values()]
        left.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    for quality, row in chosen.items():
        point = (row["tokens"].mean().item(), row["error"].mean().item())
        left.annotate(f"{quality}", point, textcoords="offset points", xytext=(4, 4), fontsize=7)
    left.set(xlabel="tokens per image (mean)", ylabel="mean absolute error reached")
    left.legend(frameon=False, fontsize=8)
    numbers = objects.unique().tolist()
    for quality in SHOWN:
        counts = [chosen[quality]["tokens"][objects == n] for n in numbers]
        rho = spearman_corrcoef(chosen[quality]["tokens"], objects.float()).item()
        means, spread = ([f(c).item() for c in counts] for f in (torch.mean, torch.std))
        label = f"quality {quality}, Spearman {rho:.2f}"
        right.errorbar(numbers, means, spread, fmt="o-", markersize=4, capsize=2, label=label)
    right.set(xlabel="objects in the scene", ylabel="tokens chosen (mean, standard deviation)", xticks=numbers)
    right.legend(frameon=False, fontsize=8)
    for plot in (left, right):
        plot.grid(alpha=0.3)
        plot.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_qualities(path: Path, tokenizer: KarlTokenizer, images: Tensor) -> None:
    """A line for each image: itself, then what is left of it at several qualities."""
    columns = [("image", images, [""] * len(images))]
    for quality in SHOWN:
        tokens = tokenizer.encode(images, quality=quality, sample_posterior=False)
        decoded = tokenizer.decode(tokens)
        errors = (decoded - images).abs().flatten(1).mean(1)
        texts = [f"{n} tokens, error {e:.3f}" for n, e in zip(tokens.lengths.tolist(), errors.tolist(), strict=True)]
        columns.append((f"quality {quality}", decoded, texts))
    figure = Figure((1.75 * len(columns), 1.95 * len(images) + 0.2), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for j, (title, pictures, texts) in enumerate(columns):
        for i, picture in enumerate(pictures):
            axis = axes[i][j]
            axis.imshow(picture.movedim(0, -1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=title if i == 0 else "")
            axis.set_xlabel(texts[i], fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="karl-tiny")
    parser.add_argument("--weights")
    parser.add_argument("--output", type=Path, default=Path("outputs/karl-report"))
    args = parser.parse_args()
    tokenizer = zoo.load_tokenizer(args.name, weights=args.weights)
    loader = Loader(
        scenes("val"), batch_size=BATCH, fields=["image", "objects"], image_size=tokenizer.config.image_size
    )
    batches = list(loader)
    images = torch.cat([batch["image"] for batch in batches])
    objects = torch.tensor([len(found) for batch in batches for found in batch["objects"]])

    step = tokenizer.config.max_tokens // 8
    counts = range(step, tokenizer.config.max_tokens + 1, step)
    jobs = [("quality", quality) for quality in QUALITIES] + [("num_tokens", n) for n in counts]
    results = {(name, v): measure(tokenizer, images, **{name: v}) for name, v in track(jobs, transient=True)}
    chosen, forced = ({v: r for (n, v), r in results.items() if n == name} for name in ("quality", "num_tokens"))

    table = Table("asked", "error", "PSNR, dB", "tokens", "p10", "p90", "Spearman with objects")
    report = {"name": args.name, "images": len(images), "quality": [], "num_tokens": []}
    for (name, value), row in results.items():
        tokens = row["tokens"]
        rho = spearman_corrcoef(tokens, objects.float()).item() if name == "quality" else None
        numbers = {
            "asked": value,
            "error": row["error"].mean().item(),
            "psnr": row["psnr"].mean().item(),
            "tokens": tokens.mean().item(),
            "tokens_p10": tokens.quantile(0.1).item(),
            "tokens_p90": tokens.quantile(0.9).item(),
            "spearman": rho,
        }
        report[name].append(numbers)
        cells = [f"{numbers[key]:.{digits}f}" for key, digits in (("error", 4), ("psnr", 2), ("tokens", 1))]
        cells += [f"{numbers[key]:.0f}" for key in ("tokens_p10", "tokens_p90")]
        asked = f"quality {value}" if name == "quality" else f"{value} tokens"
        table.add_row(asked, *cells, "" if rho is None else f"{rho:.3f}")
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "adaptivity.json", report)
    draw_curves(args.output / "curves.png", chosen, forced, objects)
    # two scenes with few objects, two with many
    order = objects.argsort(stable=True)
    draw_qualities(args.output / "qualities.png", tokenizer, images[order[[3, 60, -60, -3]]])
    Console(highlight=False).print(table)
    print(f"adaptivity.json, curves.png and qualities.png are in {args.output}")


if __name__ == "__main__":
    main()
