"""`zoo generate`: images of asked classes from a generator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.utils import make_grid

from zoo.commands import cli
from zoo.commands.common import DTYPES, about_file, about_the_run, claim, expect_one_of, seed_of, start
from zoo.errors import ZooError, expect_integer, nearest
from zoo.files import write_json, writing
from zoo.metrics.generated import frechet_distance, inception_score, read_reference
from zoo.registry import generators, load_generator, load_tokenizer, tokenizers
from zoo.tokenizers.xar.generator import check_space
from zoo.weights import MissingWeights

GRID = 64
"""Images of grid.png at the most."""


def generate(cfg: DictConfig) -> dict:
    """Write output_dir/images/NUMBER.png and, on the first rank, grid.png, samples.npz and generation.json.

    An image depends on the seed, its number and its class, not on batches or ranks; those that are there already are
    kept. Returns the report. Raises ZooError for what is wrong in the configuration, and when output_dir holds images
    of another protocol.
    """
    expect_one_of(cfg, "dtype", DTYPES)
    for name, least in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
        expect_integer(name, cfg[name], least)
    generator = load_generator(cfg.generator.name, cfg.weights, **cli.changed_fields(cfg.generator, generators))
    tokenizer = load_tokenizer(generator.config.tokenizer, cfg.tokenizer_weights)
    check_space(generator, tokenizer)
    numbers = class_numbers(cfg.classes, generator.info.classes)
    labels = torch.tensor([numbers[i * len(numbers) // cfg.num_images] for i in range(cfg.num_images)])
    settings = {"num_steps": cfg.num_steps, "guidance": cfg.guidance, "sampler": cfg.sampler}
    generator.check_settings(**settings)
    if cfg.reference is not None:
        read_reference(cfg.reference)  # before hours of sampling
    fabric, folder = start(cfg), Path(cfg.output_dir)
    about = protocol(cfg, generator, numbers)
    claim(fabric, folder, about)
    (folder / "images").mkdir(exist_ok=True)
    generator.to(fabric.device, DTYPES[cfg.dtype])
    tokenizer.to(fabric.device, DTYPES[cfg.dtype])

    there = {path.name for path in (folder / "images").iterdir()} if fabric.is_global_zero else None
    there = fabric.broadcast(there)  # as what the others see of a shared file system may be older
    missing = [i for i in range(cfg.num_images) if path_of(folder, i).name not in there]
    mine = torch.tensor(missing[fabric.global_rank :: fabric.world_size], dtype=torch.int64)
    name = generator.info.name
    batches = mine.split(cfg.batch_size) if len(mine) else ()
    for batch in track(batches, name, disable=not fabric.is_global_zero, transient=True):
        draws = [image_generator(cfg.seed, i) for i in batch.tolist()]
        tokens = generator.generate(labels[batch].to(fabric.device), generator=draws, **settings)
        for i, image in zip(batch.tolist(), to_bytes(tokenizer.decode(tokens)), strict=True):
            write_png(path_of(folder, i), image)
    fabric.barrier()
    report = {"protocol": about, "run": about_the_run(fabric), "labels": labels.tolist()}
    if fabric.is_global_zero:
        finish(folder, report, cfg, generator.info.classes, fabric)
    fabric.barrier()
    return report


def class_numbers(classes, known: tuple[str, ...]) -> list[int]:
    """Names or numbers of classes to numbers; None: all. Raises ZooError for one that there is not."""
    if classes is None:
        return list(range(len(known)))
    classes = OmegaConf.to_container(classes) if OmegaConf.is_config(classes) else classes
    classes = classes if isinstance(classes, list) else [classes]
    if not classes:
        raise ZooError("classes is an empty list; leave it out for all classes.")
    numbers = []
    for one in classes:
        if isinstance(one, int) and not isinstance(one, bool):
            if not 0 <= one < len(known):
                raise ZooError(f"classes are numbers from 0 to {len(known) - 1}, got {one}.")
            numbers.append(one)
        elif str(one) in known:
            numbers.append(known.index(str(one)))
        else:
            raise ZooError(f"there is no class '{one}'{nearest(str(one), known)}")
    return numbers


def image_generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of one image, drawn on the CPU whatever the device."""
    return torch.Generator().manual_seed(seed_of(seed, number))


def to_bytes(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] to (B, H, W, 3) uint8, rounded half to even."""
    return (images.float() * 255).round().byte().expand(-1, 3, -1, -1).movedim(1, -1).cpu().numpy()


def path_of(folder: Path, number: int) -> Path:
    return folder / "images" / f"{number:06d}.png"


def write_png(path: Path, image: np.ndarray) -> None:
    with writing(path) as file:
        Image.fromarray(image).save(file, "PNG")


def protocol(cfg: DictConfig, generator, numbers: list[int]) -> dict:
    """All that decides the images."""
    config = generator.config
    return {
        "generator": cfg.generator.name,
        "overrides": cli.changed_fields(cfg.generator, generators),
        "tokenizer": config.tokenizer,
        "weights": {
            "generator": about_file(generators.weights_path(cfg.generator.name, cfg.weights)),
            "tokenizer": about_file(tokenizers.weights_path(config.tokenizer, cfg.tokenizer_weights)),
        },
        "classes": numbers,
        "num_images": cfg.num_images,
        "num_steps": config.num_steps if cfg.num_steps is None else cfg.num_steps,
        "guidance": config.guidance if cfg.guidance is None else cfg.guidance,
        "sampler": cfg.sampler,
        "dtype": cfg.dtype,
        "seed": cfg.seed,
        "order": "class after class, each with as many images as the others",
        "rounding": "255 x, half to even",
    }


def finish(folder: Path, report: dict, cfg: DictConfig, names: tuple[str, ...], fabric: Fabric) -> None:
    """grid.png, samples.npz, generation.json, and the table."""
    images = np.stack([np.asarray(Image.open(path_of(folder, i))) for i in range(cfg.num_images)])
    chosen = np.linspace(0, len(images) - 1, min(GRID, len(images))).round().astype(int)
    shown = torch.from_numpy(images[chosen]).movedim(-1, 1)
    write_png(folder / "grid.png", make_grid(shown, nrow=round(len(shown) ** 0.5)).movedim(0, -1).numpy())
    if cfg.npz:
        with writing(folder / "samples.npz") as file:
            np.savez(file, arr_0=images, arr_1=np.array(report["labels"]))
    measures = {}
    if cfg.inception_score:
        measures["Inception Score ↑"] = lambda: inception_score(images, fabric.device)
    if cfg.reference is not None:
        name = "FID" if cfg.features == "inception" else f"FD[{cfg.features}]"
        measures[f"{name} ↓"] = lambda: frechet_distance(images, cfg.reference, cfg.features, fabric.device)
    shown = ", ".join(names[i] for i in report["protocol"]["classes"][:12])
    table = Table("", report["protocol"]["generator"])
    table.add_row("images", str(len(images)))
    table.add_row("classes", shown + ", ..." * (len(report["protocol"]["classes"]) > 12))
    report["metrics"], report["missing"] = {}, {}
    for title, measure in measures.items():
        try:
            value = report["metrics"][title[:-2]] = measure()
            table.add_row(title.replace("[", r"\["), f"{value:.4g}")
        except MissingWeights as error:
            report["missing"][title[:-2]] = str(error)
            table.add_row(title, "missing")
    write_json(folder / "generation.json", report)
    console = Console(highlight=False)
    console.print(table)
    for name, reason in report["missing"].items():
        console.print(f"{name}: {reason}", soft_wrap=True, markup=False)
    console.print(f"images, grid.png, samples.npz and generation.json are in {folder}", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return cli.run("generate", generate, argv)
