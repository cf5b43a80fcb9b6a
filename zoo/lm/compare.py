"""One table over language models that differ in their tokenizer alone; see zoo.lm.report --compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from zoo import weights
from zoo.errors import ZooError
from zoo.files import write_json, writing
from zoo.lm.judge import judge_file
from zoo.lm.model import VisualLM
from zoo.lm.report import SHOWN, read_scenes, report, show
from zoo.weights import sha256_of

READ, WRITTEN = "captions from images", "images from captions"
FACTS = {
    "number of objects": ("number stated",),
    "floor": ("floor",),
    "colours, precision / recall": ("colour, precision", "colour, recall"),
    "shapes, precision / recall": ("shape, precision", "shape, recall"),
    "colours with shapes, precision / recall": ("colour and shape, precision", "colour and shape, recall"),
}
FITS = {
    "own caption among the 5 nearest of 512": ("image to text, recall@5",),
    "nearer than with another colour": ("told from another colour",),
    "nearer than with another number": ("told from another number",),
}
BLOCKS = (
    ("captions from pictures", READ, "model", FACTS),
    ("captions of other scenes", READ, "of others", FACTS),
    ("pictures from captions", WRITTEN, "model", FACTS | FITS),
    ("pictures from captions of other scenes", WRITTEN, "of others", FACTS | FITS),
    ("what the tokenizer makes of the scenes", WRITTEN, "rebuilt", FACTS | FITS),
    ("the scenes themselves", WRITTEN, "real", FACTS | FITS),
)
"""Title, table of a report, row in that, and lines with the scores that each shows."""


def compare(runs: Sequence[Path], output: Path, device: str = "cpu", **settings) -> dict:
    """Measure the models of some output folders of `zoo train`, each once, and write comparison.json, comparison.md and
    comparison.png.

    A run's report is kept in RUN/report, and taken from there where model, judges and settings are the same; settings:
    of generate_image. Raises ZooError for a folder without a model, and runs of different budgets.
    """
    budgets = [budget_of(run) for run in runs]
    for run, budget in zip(runs, budgets, strict=True):
        if budget != budgets[0]:
            differ = ", ".join(name for name in budget if budget[name] != budgets[0][name])
            raise ZooError(f"{run} and {runs[0]} were trained with different {differ}; compare runs of one budget.")
    train, val = read_scenes()
    models = []
    for run in runs:
        found, kept = kept_report(run)
        if found is None or kept != protocol_of(run, found["input"], settings):
            found = report(VisualLM.load(run / "model", device), train, val, run / "report", **settings)
            # last: a report that was cut off is made again
            write_json(run / "report" / "protocol.json", protocol_of(run, found["input"], settings))
        models.append(found)
    found = {"budget": budgets[0], "models": models}
    names, lines = [model["tokenizer"] for model in models], lines_of(models)
    write_json(output / "comparison.json", found)
    with writing(output / "comparison.md") as file:
        file.write(markdown(names, lines).encode())
    draw(output / "comparison.png", runs, models, val)
    table = Table("", *names)
    for title, cells in lines:
        table.add_row(title if cells else f"[bold]{title}[/]", *cells, end_section=not cells)
    Console(highlight=False).print(table)
    print(f"comparison.json, comparison.md and comparison.png are in {output}")
    return found


def budget_of(run: Path) -> dict:
    """What all runs must share. Raises ZooError where a folder is no finished run of a visual language model."""
    if not (run / "config.yaml").is_file() or not (run / "model").is_dir():
        raise ZooError(f"{run} has no config.yaml and model/, as zoo train leaves them; give finished runs.")
    cfg = OmegaConf.load(run / "config.yaml")
    return {
        "steps": cfg.trainer.max_steps,
        "batch_size": cfg.data.batch_size,
        "seed": cfg.seed,
        "optimizer": OmegaConf.to_container(cfg.optimizer),
        "language_model": OmegaConf.to_container(cfg.module.lm),
    }


def kept_report(run: Path) -> tuple[dict | None, dict]:
    """The report of an earlier comparison and its protocol, if there is a whole one."""
    files = [run / "report" / name for name in ("report.json", "protocol.json")]
    return tuple(json.loads(file.read_text()) for file in files) if files[1].is_file() else (None, {})


def protocol_of(run: Path, field: str, settings: dict) -> dict:
    """All that decides what a report says."""
    files = {"model": run / "model" / "model.safetensors", "judge": judge_file(field)}
    return {name: sha256_of(path) for name, path in files.items()} | {"settings": settings}


def lines_of(models: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """Lines of the table: a title and a cell for each model; of a heading none."""
    lines = [
        ("tokens of an image", [f"{one['tokens']}" for one in models]),
        ("words of an image, read / written", [f"{one['words read']} / {one['words written']}" for one in models]),
        ("bits per pixel, written", [f"{one['bits per pixel']:.3g}" for one in models]),
        ("parameters learned, millions", [f"{one['parameters learned'] / 1e6:.2f}" for one in models]),
    ]
    for heading, table, row, measures in BLOCKS:
        lines.append((heading, []))
        for title, scores in measures.items():
            rows = [one.get(table, {}).get(row, {}) for one in models]
            lines.append((title, [" / ".join(f"{one[name]:.3f}" for name in scores if name in one) for one in rows]))
    return lines


def markdown(names: Sequence[str], lines: Sequence[tuple[str, list[str]]]) -> str:
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[title, *cells] if cells else [f"**{title}**", *[""] * len(names)] for title, cells in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(path: Path, runs: Sequence[Path], models: Sequence[dict], val: dict) -> None:
    """Write a PNG with one caption a line: the scene, and the picture of each model."""
    columns = {"scene": val["image"][:SHOWN]}
    for run, model in zip(runs, models, strict=True):
        if WRITTEN in model:
            state, _ = weights.read(run / "report" / "pictures.safetensors")
            columns[model["tokenizer"]] = state["pictures"]
    figure = Figure((1.15 * len(columns) + 3.0, 1.15 * SHOWN + 0.3), layout="constrained")
    axes = figure.subplots(SHOWN, len(columns) + 1, squeeze=False, width_ratios=(*[1] * len(columns), 2.6))
    for i, line in enumerate(axes):
        for axis, (name, images) in zip(line, columns.items(), strict=False):
            show(axis, images[i])
            if i == 0:
                axis.set_title(name, fontsize=8)
        line[-1].text(0, 0.5, fill(val["caption"][i], 46), fontsize=6.5, va="center", parse_math=False)
        for axis in line:
            axis.set_axis_off()
    with writing(path) as file:
        figure.savefig(file, dpi=110)
