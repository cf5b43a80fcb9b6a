"""The numbers and pictures of each tokenizer and of the codecs, each made once, in files of output_dir."""

from __future__ import annotations

import gc
import json
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import floor
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image
from rich.progress import track
from torch import Tensor

from zoo.commands import cli
from zoo.commands.evaluate import Entry, Shown, chosen_metrics, measured, prepared
from zoo.commands.understanding import asked, understood
from zoo.data import Loader
from zoo.distributed import all_or_none, on_first_rank
from zoo.errors import NotThere, ZooError
from zoo.files import write_json, writing
from zoo.metrics.codecs import TooFew, codec
from zoo.metrics.pictures import token_maps
from zoo.registry import load_tokenizer, tokenizers
from zoo.tokenizer import Tokenizer


@dataclass
class Group:
    """Points of tokenizers that read images of one field and one size."""

    field: str
    size: tuple[int, int]
    names: list[str] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.field} {self.size[0]} x {self.size[1]}"


def of_task(cfg: DictConfig, task: str, name: str | None = None) -> DictConfig:
    """The configuration that `zoo evaluate` would have for a task and a tokenizer, in output_dir/NAME/TASK."""
    own = cfg.copy()
    with open_dict(own):
        own.task, own.encoder, own.stored_as, own.weights, own.encode = task, None, None, None, {}
        own.baseline = task != "reconstruction"  # whose baselines are the codecs
        own.pictures = cfg.pictures if task == "reconstruction" else 0
        if name is not None:
            own.tokenizer, own.weights = cli.preset_node(name), cfg.weights.get(name)
            own.output_dir = str(Path(cfg.output_dir) / name / task)
            own.encode = encode_of(cfg, name) if task == "reconstruction" else {}
    return own


def encode_of(cfg: DictConfig, name: str) -> dict:
    """Settings of the encode of a tokenizer; one that is null is none."""
    settings = OmegaConf.to_container(cfg.encode, resolve=True).get(name) or {}
    return {key: value for key, value in settings.items() if value is not None}


def measure(cfg: DictConfig, fabric: Fabric, name: str, folder: Path) -> dict[str, str]:
    """Make FOLDER/TASK.json for each task that has none. Returns why tasks, or "loading", failed."""
    missing = fabric.broadcast([task for task in cfg.tasks if not (folder / f"{task}.json").is_file()])
    failures, tokenizer = {}, None
    for task in ["loading", *missing] if missing else ():
        own = of_task(cfg, task, name)
        try:
            if task == "loading":
                with all_or_none():
                    tokenizer = load_tokenizer(name, own.weights)
                continue
            found = (reconstruct if task == "reconstruction" else understand)(own, fabric, folder, tokenizer)
        except NotThere as error:
            found = {"lacks": str(error)}
        except Exception as error:  # whatever happens in one tokenizer, the others go on
            failures[task] = reason_of(error)
            if fabric.is_global_zero:
                with writing(folder / "error.txt") as file:
                    file.write(traceback.format_exc().encode())
            if task == "loading":
                break
            continue
        if fabric.is_global_zero:
            write_json(folder / f"{task}.json", found | {"tokenizer": about(tokenizer)}, allow_nan=False)
            shutil.rmtree(own.output_dir, ignore_errors=True)  # with what an interrupted run goes on from
    if fabric.is_global_zero and not failures:
        (folder / "error.txt").unlink(missing_ok=True)
    fabric.barrier()
    del tokenizer
    gc.collect()
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    return failures


def reason_of(error: Exception) -> str:
    """One sentence: that of a ZooError, or the kind of another error and the first line of what it says."""
    message = (str(error).strip() or "no message").splitlines()[0]
    return message if isinstance(error, ZooError) else f"{type(error).__name__}: {message}"


def reconstruct(cfg: DictConfig, fabric: Fabric, folder: Path, tokenizer: Tokenizer) -> dict:
    """The report of `zoo evaluate`, and "keys", the names of the images that are in FOLDER/pictures."""
    with all_or_none():
        subject = prepared(cfg, tokenizer)
    report, shown = measured(cfg, fabric, subject)
    if fabric.is_global_zero:
        draw(folder / "pictures", shown)
        report["keys"] = shown.keys
    return report


def understand(cfg: DictConfig, fabric: Fabric, folder: Path, tokenizer: Tokenizer) -> dict:
    """The report of `zoo evaluate task=...`."""
    return understood(cfg, fabric, tokenizers, tokenizer, asked(instantiate(cfg.labels), cfg.task))[0]


def about(tokenizer: Tokenizer) -> dict:
    info = tokenizer.info
    return asdict(info) | {"input": info.input, "parameters": sum(p.numel() for p in tokenizer.parameters())}


def draw(folder: Path, shown: Shown) -> None:
    """FOLDER/original/I.png and, for each setting, FOLDER/SETTING/I.png and FOLDER/SETTING/I STREAM.png of tokens."""
    write_pictures(folder / "original", shown.images)
    height, width = shown.images.shape[-2:]
    for number, result in enumerate(shown.results):
        for output in result.outputs.values():
            write_pictures(folder / str(number), output)
        for i in range(len(result.tokens)):
            for stream, cells in token_maps(result.tokens[i], height / width).items():
                write_picture(folder / str(number) / f"{i} {stream}.png", Image.fromarray(cells))


def write_pictures(folder: Path, images: Tensor) -> None:
    """FOLDER/I.png of images (B, 1 or 3, H, W) in [0, 1]."""
    for i, image in enumerate((images.float().clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()):
        write_picture(folder / f"{i}.png", Image.fromarray(np.squeeze(image, -1) if image.shape[-1] == 1 else image))


def write_picture(path: Path, image: Image.Image) -> None:
    with writing(path) as file:
        image.save(file, "PNG", optimize=True)


def groups(cfg: DictConfig, names: Sequence[str]) -> list[Group]:
    """What is to be compressed: the images that were reconstructed, at the bits of each point."""
    found: dict[tuple, Group] = {}
    folder = Path(cfg.output_dir)
    for name in names if "reconstruction" in cfg.tasks else ():
        report = read(folder / name / "reconstruction.json")
        if report and report["tokenizer"]["decodes_to"] != "embedding":
            key = report["tokenizer"]["input"], tuple(report["protocol"]["image_size"])
            group = found.setdefault(key, Group(*key))
            group.names.append(name)
            group.bits += [budget(row["metrics"]["bits"]) for row in report["rows"]]
    return list(found.values())


def budget(bits: float) -> float:
    """Bits an image that a codec may take, in hundredths."""
    return floor(bits * 100) / 100


def rate_budgets(cfg: DictConfig, size: Sequence[int]) -> list[float]:
    return [budget(rate * size[0] * size[1]) for rate in cfg.rates]


def compress(cfg: DictConfig, fabric: Fabric, folder: Path, group: Group) -> None:
    """Make the file `codec_file` of each codec at the bits of each point of a group and at each of cfg.rates."""
    budgets = sorted({*group.bits, *rate_budgets(cfg, group.size)})
    wanted = [(name, bits) for bits in budgets for name in cfg.codecs]
    missing = fabric.broadcast([one for one in wanted if not codec_file(folder, group, *one).is_file()])
    if not missing:
        return
    batches, keys = [], []
    with all_or_none():
        own = of_task(cfg, "reconstruction", group.names[0])
        data = instantiate(OmegaConf.to_container(own.data, resolve=True) | {"fields": [group.field]})
        place = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        for batch in Loader(data.evaluated, limit=cfg.limit, **data.options, **place):
            batches.append((batch[group.field] * 255).round().byte())
            keys.append(batch["key"])
    shape = fabric.broadcast(list(batches[0].shape[1:]) if batches else None)
    kind = "depth" if group.field == "depth" else "pixels"
    codecs = {name: codec(name, shape, batches, fabric.device) for name in cfg.codecs}
    for name, bits in track(missing, "codecs", disable=not fabric.is_global_zero, transient=True):
        path = codec_file(folder, group, name, bits)
        try:
            fit = codecs[name].fit(bits)
        except TooFew as error:
            report = {"name": name, "lacks": str(error)}
        else:
            entry = Entry(name, fit.settings, chosen_metrics(cfg.metrics, kind), [], kind)
            entry.to(fabric.device)
            with all_or_none():
                for number, (images, names) in enumerate(zip(batches, keys, strict=True)):
                    restored, targets = fit.apply(images).to(fabric.device), images.to(fabric.device) / 255
                    entry.score(restored, targets, targets, names)
                    if number == 0 and fabric.is_global_zero:
                        write_pictures(path.parent / path.stem, restored[: cfg.pictures])
            if states := on_first_rank([entry.state]):
                report = entry.report(states)
                report["metrics"]["bits"] = fit.bits
        if fabric.is_global_zero:
            write_json(path, report, allow_nan=False)
    fabric.barrier()


def codec_file(folder: Path, group: Group, name: str, bits: float) -> Path:
    return folder / "codecs" / f"{group.field}-{group.size[0]}x{group.size[1]}" / f"{name}-{round(bits * 100)}.json"


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None
