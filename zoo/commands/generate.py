"""`zoo generate`: images of asked classes from a generator."""

from __future__ import annotations

import json
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
from zoo.commands.evaluate import DTYPES, about_the_run
from zoo.errors import ZooError, nearest
from zoo.metrics.frechet import Inception
from zoo.registry import generators, load_generator, load_tokenizer, tokenizers
from zoo.tokenizer import Tokens
from zoo.tokenizers.xar.training import check_space
from zoo.weights import MissingWeights, sha256_of

GRID = 64
"""Images of grid.png at the most."""


def generate(cfg: DictConfig) -> dict:
    """Write output_dir/images/NUMBER.png and, on the first rank, grid.png, samples.npz and generation.json.

    An image depends on the seed, its number and its class, not on batches or ranks; those that are there already are
    kept. Returns the report. Raises ZooError for what is wrong in the configuration, and when output_dir holds images
    of another protocol.
    """
    check(cfg)
    generator = load_generator(cfg.generator.name, cfg.weights, **cli.changed_fields(cfg.generator, generators))
    tokenizer = load_tokenizer(generator.config.tokenizer, cfg.tokenizer_weights)
    check_space(generator, tokenizer)
    numbers = class_numbers(cfg.classes, generator.info.classes)
    labels = torch.tensor([numbers[i * len(numbers) // cfg.num_images] for i in range(cfg.num_images)])
    try:
        fabric = Fabric(accelerator=cfg.device, devices=cfg.devices, strategy=cfg.strategy)
    except (ValueError, TypeError) as error:
        raise ZooError(f"device={cfg.device} devices={cfg.devices} strategy={cfg.strategy}: {error}") from error
    fabric.launch()
    folder = Path(cfg.output_dir)
    about = protocol(cfg, generator, tokenizer, numbers)
    if fabric.is_global_zero:
        begin(folder, about)
    fabric.barrier()
    generator.to(fabric.device, DTYPES[cfg.dtype])
    tokenizer.to(fabric.device, DTYPES[cfg.dtype])

    missing = [i for i in range(cfg.num_images) if not path_of(folder, i).is_file()]
    mine = torch.tensor(missing[fabric.global_rank :: fabric.world_size], dtype=torch.int64)
    for batch in track(
        mine.split(cfg.batch_size), generator.info.name, disable=not fabric.is_global_zero, transient=True
    ):
        latents = generator.sample(
            labels[batch].to(fabric.device),
            cfg.num_steps,
            cfg.guidance,
            cfg.sampler,
            generator=[image_generator(cfg.seed, i) for i in batch.tolist()],
        )
        tokens = Tokens(latents={tokenizer.info.streams[0]: latents.flatten(2).transpose(1, 2)}, grid=latents.shape[2:])
        for i, image in zip(batch.tolist(), to_bytes(tokenizer.decode(tokens)), strict=True):
            write_png(path_of(folder, i), image)
    fabric.barrier()
    report = {"protocol": about, "run": about_the_run(fabric), "labels": labels.tolist()}
    if fabric.is_global_zero:
        finish(folder, report, cfg, generator.info.classes, fabric.device)
    return report


def check(cfg: DictConfig) -> None:
    """Raise ZooError where a field of conf/generate.yaml is not of its kind."""
    if cfg.dtype not in DTYPES:
        raise ZooError(f"dtype must be one of {', '.join(DTYPES)}, got {cfg.dtype!r}.")
    for name, least in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
        if type(cfg[name]) is not int or cfg[name] < least:
            raise ZooError(f"{name} must be an integer of at least {least}, got {cfg[name]!r}.")


def class_numbers(classes, known: tuple[str, ...]) -> list[int]:
    """Names or numbers of classes to numbers; None: all. Raises ZooError for one that there is not."""
    if classes is None:
        return list(range(len(known)))
    classes = OmegaConf.to_container(classes) if OmegaConf.is_config(classes) else classes
    classes = classes if isinstance(classes, list) else [classes]
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
    if not numbers:
        raise ZooError("classes is an empty list; leave it out for all classes.")
    return numbers


def image_generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of one image, drawn on the CPU whatever the device."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def to_bytes(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, rounded half to even."""
    return (images.float() * 255).round().byte().movedim(1, -1).cpu().numpy()


def path_of(folder: Path, number: int) -> Path:
    return folder / "images" / f"{number:06d}.png"


def write_png(path: Path, image: np.ndarray) -> None:
    part = path.with_name(f".{path.name}.part")  # a file that is there is a whole one
    Image.fromarray(image).save(part, "PNG")
    part.replace(path)


def protocol(cfg: DictConfig, generator, tokenizer, numbers: list[int]) -> dict:
    """All that decides the images."""
    files = {
        "generator": generators.weights_path(cfg.generator.name, cfg.weights),
        "tokenizer": tokenizers.weights_path(generator.config.tokenizer, cfg.tokenizer_weights),
    }
    config = generator.config
    return {
        "generator": cfg.generator.name,
        "tokenizer": config.tokenizer,
        "weights": {name: {"file": path.name, "sha256": sha256_of(path)} for name, path in files.items()},
        "classes": numbers,
        "num_images": cfg.num_images,
        "num_steps": config.num_steps if cfg.num_steps is None else cfg.num_steps,
        "guidance": config.guidance if cfg.guidance is None else cfg.guidance,
        "sampler": cfg.sampler,
        "dtype": cfg.dtype,
        "seed": cfg.seed,
        "order": "classes one after the other, each with as many images as the others",
        "rounding": "255 x, half to even",
    }


def begin(folder: Path, about: dict) -> None:
    """Make the folder, or see that what is in it is of the same protocol."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "protocol.json"
    if path.is_file() and json.loads(path.read_text()) != about:
        raise ZooError(f"{folder} holds images of another protocol (see protocol.json); choose another output_dir.")
    path.write_text(json.dumps(about, indent=2) + "\n")


def finish(folder: Path, report: dict, cfg: DictConfig, names: tuple[str, ...], device: torch.device) -> None:
    """grid.png, samples.npz, generation.json, and the table."""
    images = np.stack([np.asarray(Image.open(path_of(folder, i))) for i in range(cfg.num_images)])
    shown = torch.from_numpy(images[np.linspace(0, len(images) - 1, min(GRID, len(images))).round().astype(int)])
    grid = make_grid(shown.movedim(-1, 1), nrow=max(1, round(len(shown) ** 0.5)), pad_value=255)
    write_png(folder / "grid.png", grid.movedim(0, -1).numpy())
    if cfg.npz:
        np.savez(folder / "samples.npz", arr_0=images, arr_1=np.array(report["labels"]))
    table = Table("", cfg.generator.name)
    table.add_row("images", str(len(images)))
    table.add_row("classes", ", ".join(names[i] for i in report["protocol"]["classes"][:12]))
    if cfg.inception_score:
        try:
            report["inception_score"] = inception_score(images, device)
            table.add_row("Inception Score ↑", f"{report['inception_score']:.2f}")
        except MissingWeights as error:
            report["missing"] = {"inception_score": str(error)}
            table.add_row("Inception Score ↑", "missing")
    (folder / "generation.json").write_text(json.dumps(report, indent=2) + "\n")
    console = Console(highlight=False)
    console.print(table)
    for name, reason in report.get("missing", {}).items():
        console.print(f"{name}: {reason}", soft_wrap=True, markup=False)
    console.print(f"images, grid.png, samples.npz and generation.json are in {folder}", soft_wrap=True)


def inception_score(images: np.ndarray, device: torch.device) -> float:
    """exp of the mean KL divergence of class probabilities from their mean, over 10 splits (arXiv 1606.03498)."""
    from torchmetrics.image.inception import InceptionScore

    Inception()  # raises MissingWeights
    metric = InceptionScore(feature="logits_unbiased").to(device)
    for batch in np.array_split(images, max(1, len(images) // 32)):
        metric.update(torch.from_numpy(batch).movedim(-1, 1).to(device))
    return metric.compute()[0].item()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return cli.run("generate", generate, argv)
