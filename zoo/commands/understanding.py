"""`zoo evaluate task=zeroshot` and `task=probe`: what a tokenizer or an encoder understands of images."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor

from zoo.commands import cli
from zoo.commands.common import (
    DTYPES,
    about_file,
    about_rows,
    about_the_run,
    decisive,
    expect_one_of,
    preparation,
    start,
    table,
)
from zoo.commands.progress import SharedBatches
from zoo.data import ZooDataModule, joined
from zoo.data.questions import Labels, Question
from zoo.distributed import all_or_none, on_first_rank
from zoo.errors import ZooError
from zoo.files import write_json
from zoo.metrics.base import Row
from zoo.metrics.pictures import draw_ranking
from zoo.metrics.probe import most_frequent, probe
from zoo.metrics.retrieval import chance_at, recall_at, recalls
from zoo.metrics.zeroshot import text_classifier
from zoo.registry import Registry, encoders, tokenizers
from zoo.tokenizer import ImageReader

KS = (1, 5)
THUMBNAIL = 8
"""Side in pixels of the picture that a probe is also fitted on."""
SHOWN = 3
"""Texts beside each image of retrieval.png."""


def understanding(cfg: DictConfig) -> dict:
    """What the images of cfg.data show, as cfg.labels knows it, from the embeddings or features of one reader.

    Every rank reads its share of the images. The first one scores all of them in the order of the data, writes
    metrics.json and, for task=zeroshot, retrieval.png, and prints the table; every rank returns the same report. What
    a killed run has read is in output_dir/progress, and is not read again.
    Raises ZooError for what is wrong in the configuration.
    """
    check(cfg)
    registry, node = (encoders, cfg.encoder) if cfg.get("encoder") else (tokenizers, cfg.tokenizer)
    labels = asked(instantiate(cfg.labels), cfg.task)
    reader = registry.load(node.name, cfg.weights, **cli.changed_fields(node, registry))
    report, rows = understood(cfg, start(cfg), registry, reader, labels)
    if rows:
        write(report, rows, Path(cfg.output_dir))
        shutil.rmtree(Path(cfg.output_dir) / "progress")
    return report


def understood(
    cfg: DictConfig, fabric: Fabric, registry: Registry, reader: ImageReader, labels: Labels
) -> tuple[dict, list[Row] | None]:
    """The report, on every rank, and the rows of its table, None but on the first rank.

    What was read so far stays in output_dir/progress, to be removed when the report is safe.
    """
    fields = [reader.info.input, *(field for question in labels.questions for field in question.fields)]
    fields = list(dict.fromkeys([*fields, "caption"] if labels.captions else fields))
    source = OmegaConf.to_container(cfg.data, resolve=True) | {"fields": fields}
    data = instantiate(source)
    reader.to(fabric.device, DTYPES[cfg.dtype])

    node = cfg[registry.kind]
    about = {
        "task": cfg.task,
        registry.kind: node.name,
        "overrides": cli.changed_fields(node, registry),
        "weights": about_file(registry.weights_path(node.name, cfg.weights)),
        "data": decisive(source),
        "labels": OmegaConf.to_container(cfg.labels, resolve=True),
        **preparation(source),
        "limit": cfg.limit,
        "dtype": cfg.dtype,
    }
    read = partial(read_part, cfg, fabric, about, data.options)
    found = TASKS[cfg.task](cfg, fabric, reader, labels, data, read)
    report, rows = None, None
    if found:
        about_task, rows, entries = found
        report = {
            "protocol": about | about_task,
            "run": about_the_run(fabric),
            "measures": about_rows(rows),
            "rows": [entry(name, metrics) for name, metrics in entries.items()],
        }
    return fabric.broadcast(report), rows


def check(cfg: DictConfig) -> None:
    """Raise ZooError where a field of conf/evaluate.yaml has nothing to do with the task, or is missing for it."""
    expect_one_of(cfg, "pool", ("mean", "whole"))
    for name in ("encode", "stored_as"):
        if cfg[name]:
            raise ZooError(f"{name} is for task=reconstruction and means nothing to task={cfg.task}; leave it out.")
    if not cfg.get("labels"):
        raise ZooError(
            f"task={cfg.task} asks about images; say labels=captions where the samples have the field 'caption', or "
            "labels=classes where they have 'class'."
        )


def asked(labels: Labels, task: str) -> Labels:
    """What of the labels a task is about. Raises ZooError where there is nothing."""
    if task == "probe":
        if not labels.questions:
            raise ZooError("task=probe learns from labels, and captions alone are none; use labels=classes.")
        return Labels(labels.questions)
    questions = [question for question in labels.questions if question.texts]
    if not questions and not labels.captions:
        raise ZooError("task=zeroshot needs texts; give names of classes, labels.classes, or use labels=captions.")
    return Labels(questions, labels.captions)


def read_part(
    cfg: DictConfig, fabric: Fabric, about: dict, options: dict, part: str, source, look: Callable[[dict], dict]
) -> tuple[dict | None, SharedBatches]:
    """What `look` makes of the batches of a source, over all ranks as one batch, on the first rank; and the batches.

    Raises ZooError, on every rank, where there is no image.
    """
    seen = {}
    batches = SharedBatches(
        fabric, Path(cfg.output_dir) / "progress" / part, about, source, options, cfg, state=lambda: seen
    )
    with all_or_none():
        for number, batch in batches:
            seen[number] = look(batch)
    states = batches.found()
    found = states and {number: one for state in states for number, one in state.items()}
    if not fabric.broadcast(bool(found)):
        raise ZooError(f"no image came from {source}.")
    return found and joined([one for _, one in sorted(found.items())]), batches


def zeroshot(cfg: DictConfig, fabric: Fabric, reader: ImageReader, labels: Labels, data: ZooDataModule, read: Callable):
    """Retrieval among all images and their captions, and classes by the nearest of their texts."""
    embedded = {q.name: embed_texts(reader, q.texts, cfg.batch_size, fabric) for q in labels.questions}

    def look(batch: dict) -> dict:
        images = batch[reader.info.input]
        found = {"image": reader.encode_image(images).float().cpu()} | answers(batch, labels.questions)
        if labels.captions:
            found |= {"caption": batch["caption"], "text": reader.encode_text(batch["caption"]).float().cpu()}
        return found

    seen, batches = read("val", data.evaluated, look)
    if seen is None:
        return None
    own, chance, rows, ranking = {}, {}, [], None
    if labels.captions:
        similarity, relevant = seen["image"] @ seen["text"].T, equal(seen["caption"])
        own |= recalls(similarity, relevant, KS)
        for name in own:
            chance[name] = chance_at(relevant, int(name[-1]))
            rows.append(Row(name, name.replace("_recall@", ", recall at ").replace("_", " "), "higher"))
        ranking = similarity, relevant, seen["caption"]
    for question in labels.questions:
        scores = seen["image"] @ text_classifier(embedded[question.name]).T
        relevant = F.one_hot(seen[question.name], len(question.texts)).bool()
        for k in (k for k in KS if k == 1 or k < len(question.texts)):
            row = Row(f"top{k}/{question.name}", f"{question.name}, top {k}", "higher")
            rows.append(row)
            own[row.name], chance[row.name] = recall_at(scores, relevant, k), chance_at(relevant, k)
        ranking = ranking or (scores, relevant, [texts[0] for texts in question.texts])
    if cfg.pictures:
        shown = batches.first()[reader.info.input][: cfg.pictures]
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        draw_ranking(Path(cfg.output_dir) / "retrieval.png", shown, *ranking, SHOWN)
    about = {"images": len(seen["image"]), "split": "train" if data.val is None else "val"}
    about["texts"] = {q.name: about_texts(q.texts) for q in labels.questions}
    entries = {reader.info.name: own, "chance": chance} if cfg.baseline else {reader.info.name: own}
    return about, rows, {name: {key: float(value) for key, value in one.items()} for name, one in entries.items()}


def linear(cfg: DictConfig, fabric: Fabric, reader: ImageReader, labels: Labels, data: ZooDataModule, read: Callable):
    """One linear map, fitted on the features of the training split, and judged on the validation split."""
    if data.train is None or data.val is None:
        raise ZooError(
            f"a probe is fitted on one split and judged on another, and this data has no "
            f"data.{'train' if data.train is None else 'val'}; give both (of a folder, data.path and data.val_path)."
        )
    pool = {"mean": lambda features: features.mean(1), "whole": lambda features: features.flatten(1)}[cfg.pool]
    views = {reader.info.name: lambda images: pool(reader.features(images).float())}
    if cfg.baseline:
        views["thumbnail"] = lambda images: F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)

    def look(batch: dict) -> dict:
        images = batch[reader.info.input]
        return {name: view(images).cpu() for name, view in views.items()} | answers(batch, labels.questions)

    (train, _), (val, _) = (read(part, source, look) for part, source in (("train", data.train), ("val", data.val)))
    if train is None:
        return None
    learned, expected = ({q.name: part[q.name] for q in labels.questions} for part in (train, val))
    entries = {name: probe(train[name], learned, val[name], expected) for name in views}
    if cfg.baseline:
        entries["most frequent"] = most_frequent(learned, expected)
    measure = {name: "accuracy" if one.ndim == 1 else "AUROC" for name, one in learned.items()}
    rows = [Row(name, f"{name}, {measure[name]}", "higher") for name in learned]
    about = {
        "images": len(val[reader.info.name]),
        "training_images": len(train[reader.info.name]),
        "pool": cfg.pool,
        "thumbnail": f"{THUMBNAIL} x {THUMBNAIL} pixels, averages",
        "probe": "ridge regression, its penalty chosen on every fifth of the training images",
    }
    return about, rows, entries


TASKS = {"zeroshot": zeroshot, "probe": linear}


def answers(batch: dict, questions: Sequence[Question]) -> dict[str, Tensor]:
    """By question. Raises ZooError for a class that has no text, where there are texts."""
    found = {question.name: question.answers(batch) for question in questions}
    for question in questions:
        low, high = (bound.item() for bound in torch.aminmax(found[question.name].long()))
        if low < 0 or (question.texts and high >= len(question.texts)):
            raise ZooError(
                f"an image is of class {low if low < 0 else high}, counted from 0, and labels has names for "
                f"{len(question.texts)} classes; give one for each."
            )
    return found


def embed_texts(reader: ImageReader, texts: Sequence[Sequence[str]], size: int, fabric: Fabric) -> Tensor | None:
    """Texts (K, T) to embeddings (K, T, D), each rank its share, `size` at once; None but on the first rank."""
    flat = [text for one in texts for text in one]
    begin, end = (len(flat) * r // fabric.world_size for r in (fabric.global_rank, fabric.global_rank + 1))
    chunks = track(range(begin, end, size), "texts", disable=not fabric.is_global_zero, transient=True)
    with all_or_none():
        own = [reader.encode_text(flat[i : min(i + size, end)]).float().cpu() for i in chunks]
    parts = on_first_rank(own)
    return parts and torch.cat(parts).unflatten(0, (len(texts), -1))


def equal(texts: Sequence[str]) -> Tensor:
    """(B, B) bool: which texts are the same."""
    places = {text: i for i, text in enumerate(texts)}
    numbers = torch.tensor([places[text] for text in texts])
    return numbers[:, None] == numbers


def about_texts(texts: Sequence[Sequence[str]]) -> dict:
    flat = "\n".join(text for one in texts for text in one)
    return {"classes": len(texts), "templates": len(texts[0]), "sha256": hashlib.sha256(flat.encode()).hexdigest()}


def entry(name: str, metrics: dict[str, float]) -> dict:
    missing = {key: "no two of the images differ in this." for key, value in metrics.items() if math.isnan(value)}
    metrics = {key: None if key in missing else value for key, value in metrics.items()}
    return {"name": name, "settings": {}, "metrics": metrics, "missing": missing}


def write(report: dict, rows: list[Row], folder: Path) -> None:
    """metrics.json, and the table on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", report, allow_nan=False)
    protocol, entries = report["protocol"], report["rows"]
    title = f"{protocol['task']}: {entries[0]['name']}, {protocol['images']} images"
    console = Console(highlight=False)
    console.print(table(title, entries, {row.name: row for row in rows}))
    for name, reason in entries[0]["missing"].items():
        console.print(f"{name}: {reason}", soft_wrap=True, markup=False)
    files = "metrics.json and retrieval.png are" if protocol["task"] == "zeroshot" else "metrics.json is"
    console.print(f"{files} in {folder}", soft_wrap=True)
