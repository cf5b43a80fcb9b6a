"""`zoo evaluate`: how much of an image a tokenizer keeps, with how many tokens, at which speed; what it understands."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.fabric import Fabric
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from zoo.commands import cli
from zoo.commands.common import (
    COLUMNS,
    DTYPES,
    about_file,
    about_rows,
    about_the_run,
    combinations,
    decisive,
    expect_one_of,
    label,
    preparation,
    start,
    table,
)
from zoo.commands.progress import SharedBatches
from zoo.commands.understanding import TASKS, understanding
from zoo.distributed import all_or_none
from zoo.errors import ZooError, expect_integer
from zoo.files import write_json
from zoo.metrics.base import Row
from zoo.metrics.cost import Cost, reset_peak, timed
from zoo.metrics.frechet import FrechetDistance
from zoo.metrics.pictures import draw_rate_distortion, draw_reconstructions
from zoo.metrics.storage import FORMATS
from zoo.metrics.thumbnail import ThumbnailSize, thumbnail
from zoo.metrics.tokens import TokenStatistics, numbers
from zoo.registry import load_tokenizer, weights_path
from zoo.tokenizer import Tokenizer, Tokens
from zoo.weights import MissingWeights

SWEPT = {
    "tokens_mean": "tokens",
    "tokens_p10": "10 %",
    "tokens_p90": "90 %",
    "bits": "bits",
    "mae": "error",
    "psnr": "PSNR, dB",
}
"""Measures of the table that has one line for each setting, and what they are called there."""


class Entry:
    """A row of the report: all that is measured of the tokenizer under some settings, or of a baseline.

    kind: what it decodes to, as in TokenizerInfo.
    """

    def __init__(self, name: str, settings: dict, metrics: Mapping, statistics: list[Metric], kind: str):
        self.name, self.settings, self.statistics = name, settings, statistics
        self.metrics: list[Metric] = []
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}
        for key, node in metrics.items():
            try:
                metric = instantiate(node)
                self.metrics.append(metric)
            except InstantiationException as error:
                if not isinstance(error.__cause__, MissingWeights):
                    raise
                metric = get_class(node["_target_"])  # knows which numbers will be missing
                self.missing |= {row.name: str(error.__cause__) for row in metric.rows}
            if kind not in metric.kinds:
                raise ZooError(
                    f"metrics.{key} is for tokenizers that decode to {' or '.join(metric.kinds)}, and {name} "
                    f"decodes to {kind}; leave it out, or use metrics=auto."
                )
            self.rows += metric.rows

    def to(self, device: torch.device) -> None:
        for metric in (*self.metrics, *self.statistics):
            metric.to(device)

    def score(self, reconstructions: Tensor, images: Tensor, stored: Tensor, keys: list[str]) -> None:
        for metric in self.metrics:
            metric.update(reconstructions, stored if isinstance(metric, FrechetDistance) else images, keys)

    @property
    def state(self) -> list[dict]:
        """Of each metric, what it has found so far."""
        return [move_data_to_device(metric.metric_state, "cpu") for metric in (*self.metrics, *self.statistics)]

    def report(self, states: list[list[dict]]) -> dict:
        """Its numbers over all `states`; None for one that cannot be given, with the reason under "missing"."""
        values: dict[str, float | None] = dict.fromkeys(self.missing)
        for i, metric in enumerate((*self.metrics, *self.statistics)):
            metric.reset()
            for state in states:
                metric.merge_state(move_data_to_device(state[i], metric.device))
            try:
                found = type(metric).compute(metric)  # that of the instance would ask the other ranks
                values |= {name: float(value) for name, value in found.items()}
            except ZooError as error:
                values |= {row.name: None for row in metric.rows}
                self.missing |= {row.name: str(error) for row in metric.rows}
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                values[name] = None
                self.missing[name] = f"the result is {value}: nothing to average over, or a reconstruction holds NaN."
        for metric in self.statistics:
            self.rows += metric.rows
        return {"name": self.name, "settings": self.settings, "metrics": values, "missing": self.missing}


def evaluate(cfg: DictConfig) -> dict:
    """What cfg.task asks for; returns the report that is also written to output_dir."""
    expect_one_of(cfg, "task", ("reconstruction", *TASKS))
    check(cfg)
    return reconstruction(cfg) if cfg.task == "reconstruction" else understanding(cfg)


def reconstruction(cfg: DictConfig) -> dict:
    """Score a tokenizer on a data set; returns the report that is also written to output_dir.

    What is scored is the reconstruction against exactly the crop that went into the tokenizer. With stored_as it is
    what a file in that format gives back of the reconstruction, and a Frechet distance then compares the crops with it
    in the same format, as two folders of files do. Every rank takes its share of the images and returns the same
    report; the first writes metrics.json and reconstructions.png and prints the table. What a killed run has measured
    is in output_dir/progress, and is not measured again.
    Raises ZooError for what is wrong in the configuration.
    """
    if cfg.get("encoder"):
        raise ZooError(
            f"{cfg.encoder.name} is an encoder, which reconstructs nothing; use task=zeroshot or task=probe, or say "
            "tokenizer=NAME."
        )
    tokenizer = load_tokenizer(cfg.tokenizer.name, weights=cfg.weights, **cli.changed_fields(cfg.tokenizer))
    subject = prepared(cfg, tokenizer)
    fabric = start(cfg)
    report, shown = measured(cfg, fabric, subject)
    if fabric.is_global_zero:
        write(report, {row.name: row for entry in subject.entries for row in entry.rows}, shown, cfg)
        shutil.rmtree(progress_of(cfg))
    return report


class Subject(NamedTuple):
    """What is measured: a tokenizer, and for each setting of its encode an entry and that of its thumbnail."""

    tokenizer: Tokenizer
    metrics: dict
    pairs: list[tuple[Entry, Entry | None]]

    @property
    def entries(self) -> list[Entry]:
        return [entry for pair in self.pairs for entry in pair if entry]


class Shown(NamedTuple):
    """The first images and their names, and what came of them under each setting."""

    images: Tensor
    keys: list[str]
    results: list[Result]


def prepared(cfg: DictConfig, tokenizer: Tokenizer) -> Subject:
    """What cfg says is to be measured of a tokenizer. Raises ZooError for settings or measures that do not fit it."""
    info = tokenizer.info
    metrics = chosen_metrics(cfg.metrics, info.decodes_to)
    pairs = []
    for settings in combinations(cfg.encode, tokenizer):
        entry = Entry(info.name, settings, metrics, [TokenStatistics(info), Cost()], info.decodes_to)
        baseline = None
        if cfg.baseline and info.decodes_to != "embedding":
            baseline = Entry("thumbnail", settings, metrics, [ThumbnailSize()], info.decodes_to)
        pairs.append((entry, baseline))
    return Subject(tokenizer, metrics, pairs)


def measured(cfg: DictConfig, fabric: Fabric, subject: Subject) -> tuple[dict, Shown | None]:
    """The report over all ranks, and on the first one cfg.pictures images; None on the others.

    What was measured so far stays in `progress_of` cfg, to be removed when the report is safe. Raises ZooError, on
    every rank, where there is no image to score.
    """
    tokenizer, entries, info = subject.tokenizer, subject.entries, subject.tokenizer.info
    tokenizer.to(fabric.device, DTYPES[cfg.dtype])
    for entry in entries:
        entry.to(fabric.device)
    source = OmegaConf.to_container(cfg.data, resolve=True) | {"fields": [info.input]}
    data = instantiate(source)
    about = protocol(cfg, source, subject)
    found = [[type(metric).__name__ for metric in entry.metrics] for entry in entries]  # what has its weights
    batches = SharedBatches(
        fabric, progress_of(cfg), about | {"measured": found}, data.evaluated, data.options, cfg,
        lambda: [entry.state for entry in entries],
    )  # fmt: skip
    warm = False
    reset_peak(fabric.device)
    with all_or_none():
        for _, batch in batches:
            images, keys = batch[info.input].to(fabric.device), batch["key"]
            if not warm:  # no first call is timed
                for entry, _ in subject.pairs:
                    through(tokenizer, images, entry.settings)
                warm = True
            for entry, baseline in subject.pairs:
                score(tokenizer, images, keys, entry, baseline, cfg.stored_as)

    states, report, shown = batches.found(), None, None
    if states:
        rows = [entry.report([state[i] for state in states]) for i, entry in enumerate(entries)]
        if count := int(rows[0]["metrics"]["images"]):
            first = batches.first()
            images = first[info.input].to(fabric.device)
            report = {
                "protocol": about | {"images": count, "image_size": list(images.shape[-2:])},
                "run": about_the_run(fabric),
                "measures": about_rows(row for entry in entries for row in entry.rows),
                "rows": rows,
            }
            images = images[: cfg.pictures or 0]
            pairs = subject.pairs if len(images) else ()
            results = [reconstruct(tokenizer, images, *pair, cfg.stored_as) for pair in pairs]
            shown = Shown(images, first["key"][: len(images)], results)
    report = fabric.broadcast(report)
    if report is None:
        raise ZooError(f"no image to score came from data={source}.")
    return report, shown


def progress_of(cfg: DictConfig) -> Path:
    return Path(cfg.output_dir) / "progress"


def score(tokenizer, images: Tensor, keys: list[str], entry: Entry, baseline: Entry | None, stored_as: str | None):
    """Measure one batch under one setting."""
    result = reconstruct(tokenizer, images, entry, baseline, stored_as)
    entry.statistics[0].update(result.tokens)
    entry.statistics[1].update(len(images), result.encode_seconds, result.decode_seconds)
    if baseline:
        baseline.statistics[0].update(result.used)
    stored = FORMATS[stored_as](images) if stored_as else images
    for one, output in result.outputs.items():
        one.score(output, images, stored, keys)


class Result(NamedTuple):
    """Of one batch under one setting."""

    tokens: Tokens
    outputs: dict[Entry, Tensor]
    used: Tensor | None
    """(B,) numbers that the thumbnails of the baseline hold."""
    encode_seconds: float
    decode_seconds: float


def reconstruct(
    tokenizer: Tokenizer, images: Tensor, entry: Entry, baseline: Entry | None, stored_as: str | None
) -> Result:
    tokens, output, encode_seconds, decode_seconds = through(tokenizer, images, entry.settings)
    outputs, used = {} if output is None else {entry: output.float()}, None
    if baseline:
        outputs[baseline], used = thumbnail(images, numbers(tokens))
    if stored_as:
        outputs = {one: FORMATS[stored_as](output) for one, output in outputs.items()}
    return Result(tokens, outputs, used, encode_seconds, decode_seconds)


def through(tokenizer: Tokenizer, images: Tensor, settings: dict) -> tuple[Tokens, Tensor | None, float, float]:
    """Tokens, reconstructions (None where there is no decoder to images), and the seconds that each took."""
    tokens, encode_seconds = timed(images.device, tokenizer.encode, images, **settings)
    if tokenizer.info.decodes_to == "embedding":
        return tokens, None, encode_seconds, 0.0
    output, decode_seconds = timed(images.device, tokenizer.decode, tokens)
    return tokens, output, encode_seconds, decode_seconds


def check(cfg: DictConfig) -> None:
    """Raise ZooError where a field of conf/evaluate.yaml is not of its kind."""
    expect_one_of(cfg, "dtype", DTYPES)
    if cfg.stored_as is not None:
        expect_one_of(cfg, "stored_as", FORMATS)
    if type(cfg.baseline) is not bool:
        raise ZooError(f"baseline must be true or false, got {cfg.baseline!r}.")
    for name, least in (("limit", 1), ("pictures", 0)):
        if cfg[name] is not None:
            expect_integer(name, cfg[name], least)
    expect_integer("save_every", cfg.save_every, 0)


def chosen_metrics(node: DictConfig, kind: str) -> dict:
    """The measures by name: under "auto" those for what is decoded, and with them the ones asked for beside it."""
    metrics = OmegaConf.to_container(node, resolve=True)
    return metrics.pop("auto", {}).get(kind, {}) | metrics


def protocol(cfg: DictConfig, source: dict, subject: Subject) -> dict:
    """All that decides the numbers: reports whose protocols are equal can be compared."""
    return {
        "task": "reconstruction",
        "tokenizer": cfg.tokenizer.name,
        "overrides": cli.changed_fields(cfg.tokenizer),
        "weights": about_file(weights_path(cfg.tokenizer.name, cfg.weights)),
        "encode": OmegaConf.to_container(cfg.encode, resolve=True),
        "data": decisive(source),
        "split": "train" if source.get("val") is None else "val",
        **preparation(source),
        "scored": "the crop that went into the tokenizer against its reconstruction, clamped to [0, 1]",
        "stored_as": cfg.stored_as,
        "thumbnail": "bicubic, with as many numbers as ids or latent values, each kept as a 32-bit float",
        "metrics": subject.metrics,
        "limit": cfg.limit,
        "dtype": cfg.dtype,
        "seed": cfg.seed,
    }


def write(report: dict, rows: dict[str, Row], shown: Shown, cfg: DictConfig) -> None:
    """metrics.json, a picture of images for each setting and one of all settings, and the tables on the terminal."""
    folder = Path(cfg.output_dir)
    write_json(folder / "metrics.json", report, allow_nan=False)
    for i, result in enumerate(shown.results, 1):
        if result.outputs:
            path = folder / ("reconstructions.png" if len(shown.results) == 1 else f"reconstructions-{i}.png")
            outputs = {label(entry.name, entry.settings): output for entry, output in result.outputs.items()}
            draw_reconstructions(path, shown.images, outputs, result.tokens)
    console = Console(highlight=False)
    about, (height, width) = report["protocol"], report["protocol"]["image_size"]
    title = f"{about['tokenizer']}: {about['images']} images of {height} x {width} pixels"
    for i in range(0, len(report["rows"]), COLUMNS):
        console.print(table(title, report["rows"][i : i + COLUMNS], rows))
    if sum(entry["name"] == about["tokenizer"] for entry in report["rows"]) > 1:
        console.print(sweep_table(report["rows"], rows))
        if "psnr" in rows:
            draw_sweep(folder / "rate-distortion.png", report["rows"], rows)
    for entry in report["rows"][:1]:
        for name, reason in entry["missing"].items():
            console.print(f"{rows[name].title if name in rows else name}: {reason}", soft_wrap=True, markup=False)
    console.print(f"metrics.json and pictures are in {folder}", soft_wrap=True)


def sweep_table(entries: list[dict], rows: dict[str, Row]) -> Table:
    """One line for each setting: what was asked, what came out, and the thumbnail's PSNR."""
    table = Table(title="settings of encode, one a line; numbers per image")
    shown = [rows[name] for name in SWEPT if name in rows]
    tokenizer = entries[0]["name"]
    for title in (*entries[0]["settings"], *(SWEPT[row.name] for row in shown)):
        table.add_column(title, justify="right")
    thumbnails = [entry for entry in entries if entry["name"] != tokenizer]
    if thumbnails and "psnr" in rows:
        table.add_column("thumbnail, dB", justify="right")
    for i, entry in enumerate(entry for entry in entries if entry["name"] == tokenizer):
        cells = [str(value) for value in entry["settings"].values()]
        for row in shown:
            value = entry["metrics"].get(row.name)
            cells.append("missing" if value is None else f"{value:{row.format}}")
        if thumbnails and "psnr" in rows:
            cells.append(f"{thumbnails[i]['metrics']['psnr']:.2f}")
        table.add_row(*cells)
    return table


def draw_sweep(path: Path, entries: list[dict], rows: dict[str, Row]) -> None:
    """PSNR against numbers per image, one point for each setting of encode."""
    curves = {}
    for entry in entries:
        metrics = entry["metrics"]
        own = entry["name"] == entries[0]["name"]
        text = ", ".join(str(value) for value in entry["settings"].values()) if own else ""
        if metrics["psnr"] is not None:
            curves.setdefault(entry["name"], []).append((metrics["numbers"], metrics["psnr"], text))
    draw_rate_distortion(path, curves, (rows["numbers"].title, rows["psnr"].title))


def main(argv: list[str] | None = None) -> int:
    return cli.run("evaluate", evaluate, cli.with_open_fields(argv, "encode"))
