"""The paper's main comparison (tables 4 and 5 of arXiv 2505.10562) on the embedded scenes.

    python -m zoo.tokenizers.ett.report --runs FOLDER [--output outputs/ett-report] [--device cuda]

FOLDER holds runs as SEED/VARIANT/model, folders of VisualLM.save: "ids" (frozen tokenizer, a word for each id),
"frozen" (frozen tokenizer, codebook embeddings) and "alpha-0", "alpha-0.25", ... (tuned with that weight of the
tokenizer's own loss). Of each, on the 512 validation scenes: the loss of a word of a caption, how right greedy captions
are (see zoo.lm.report), PSNR of what the tokenizer makes of the pictures, and its use of codes. Means over seeds, and
the standard deviation between them. Writes report.json, comparison.png and pictures.png, and beside each model what was
measured, which a later report takes from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.utils import make_grid, save_image

from zoo.data import read_all, scenes
from zoo.errors import ZooError
from zoo.files import write_json
from zoo.lm.facts import fact_scores, facts_of_caption, facts_of_scenes
from zoo.lm.judge import resized
from zoo.lm.model import VisualLM
from zoo.lm.report import BATCH, in_batches, written_captions
from zoo.metrics.psnr import PSNR
from zoo.metrics.tokens import TokenStatistics

COLUMNS = {
    "loss": "caption loss, nats a word",
    "number stated": "right number",
    "colour, exact": "all colours right",
    "shape, exact": "all shapes right",
    "object, recall": "objects found",
    "psnr": "PSNR, dB",
    "usage": "codes in use",
    "perplexity": "perplexity",
}
PICTURED = 8


def measured(path: Path, val: dict, device: str = "cpu") -> dict[str, float]:
    """The columns for the model in a folder, which are kept beside it."""
    file = path.with_name("measured.json")
    if not file.is_file():
        model = VisualLM.load(path, device)
        found = measure(model, resized(val["image"], model.vision.tokenizer.info.image_size), val)
        write_json(file, found)
    return json.loads(file.read_text())


@torch.no_grad()
def measure(model: VisualLM, images: Tensor, val: dict) -> dict[str, float]:
    """The columns for one model; images (B, C, S, S), as its tokenizer takes them, of a batch with captions, facts."""
    said, numbers = written_captions(model, images), range(len(images))

    def words(rows: range) -> Tensor:
        never = torch.zeros(len(rows), dtype=torch.bool)
        texts = [val["caption"][i] for i in rows]
        return model(texts, images[rows.start : rows.stop].to(model.lm.device), never, never)[0]

    scores = fact_scores(list(map(facts_of_caption, said)), facts_of_scenes(val))
    tokenizer, psnr = model.vision.tokenizer, PSNR()
    statistics = TokenStatistics(tokenizer.info)
    for some in images.split(BATCH):
        statistics.update(tokenizer.encode(some).cpu())
        psnr.update(model.vision.reconstruct(some).cpu(), some)
    used = {name: one.item() for name, one in statistics.compute().items()}
    scores |= {"loss": in_batches(words, numbers).mean().item(), "psnr": psnr.compute()["psnr"].item()}
    for column, measure in (("usage", "codebook_use"), ("perplexity", "perplexity")):
        scores[column] = fmean(used[f"{measure}/{stream}"] for stream in tokenizer.info.streams)
    return {name: scores[name] for name in COLUMNS}


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """{variant: {column: (mean over seeds, standard deviation)}}; that of one seed is 0."""
    return {
        variant: {
            name: (fmean(row[name] for row in rows), stdev(row[name] for row in rows) if len(rows) > 1 else 0.0)
            for name in COLUMNS
        }
        for variant, rows in runs.items()
    }


def draw(path: Path, runs: dict[str, list[dict[str, float]]]) -> None:
    """Write a PNG: every run as a point, by what its captions and its pictures are worth."""
    figure = Figure((10, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("loss", "object, recall"), strict=True):
        for variant, rows in runs.items():
            axis.scatter([row["psnr"] for row in rows], [row[name] for row in rows], label=variant)
        axis.set(xlabel=COLUMNS["psnr"], ylabel=COLUMNS[name])
        axis.legend()
    figure.savefig(path, dpi=110)


def found_runs(folder: Path) -> dict[str, list[Path]]:
    """{variant: models of its seeds}. Raises ZooError where there are none, or a variant lacks a seed."""
    models = sorted(path for path in folder.glob("*/*/model") if path.is_dir())
    seeds, variants = ({path.parts[-k] for path in models} for k in (3, 2))
    if not models:
        raise ZooError(f"{folder} holds no runs SEED/VARIANT/model; zoo/tokenizers/ett/README.md makes them.")
    missing = [f"{s}/{v}" for s in sorted(seeds) for v in sorted(variants) if folder / s / v / "model" not in models]
    if missing:
        raise ZooError(f"{folder} lacks {', '.join(missing)}; every seed needs every variant.")
    order = sorted(variants, key=lambda name: (name.startswith("alpha"), name != "ids", name))
    return {variant: [path for path in models if path.parts[-2] == variant] for variant in order}


def report(folder: Path, output: Path, device: str = "cpu") -> dict:
    """Measure all runs of a folder, write what was found and print it."""
    val = read_all(scenes("val"), ["image", "caption", "count", "objects", "floor"])
    models, runs, rows = found_runs(folder), {}, [val["image"][:PICTURED]]
    for variant, paths in track(models.items(), "variants", transient=True):
        for path in paths:
            runs.setdefault(variant, []).append(measured(path, val, device))
        model = VisualLM.load(paths[0], device)
        images = resized(val["image"], model.vision.tokenizer.info.image_size)
        rows.append(resized(model.vision.reconstruct(images[:PICTURED]).cpu(), val["image"].shape[-1]))
    output.mkdir(parents=True, exist_ok=True)
    found = {"scenes": len(val["image"]), "runs": runs, "summary": summary(runs)}
    write_json(output / "report.json", found)
    draw(output / "comparison.png", runs)
    save_image(make_grid(torch.cat(rows), nrow=PICTURED), output / "pictures.png")
    table = Table("", *found["summary"])
    for name, title in COLUMNS.items():
        table.add_row(title, *(f"{row[name][0]:.3f} ± {row[name][1]:.3f}" for row in found["summary"].values()))
    Console(highlight=False).print(table)
    print(f"{len(next(iter(runs.values())))} seeds; report.json, comparison.png and pictures.png are in {output}")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="a folder of SEED/VARIANT/model")
    parser.add_argument("--output", type=Path, default=Path("outputs/ett-report"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    report(args.runs, args.output, args.device)


if __name__ == "__main__":
    main()
