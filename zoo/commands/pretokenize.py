"""`zoo pretokenize`: a data set to webdataset shards of its tokens."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from zoo.commands import cli
from zoo.commands.common import DTYPES, about_file, about_the_run, claim, combinations, expect_one_of, start
from zoo.data import Loader
from zoo.data.tars import members, split_name
from zoo.data.tokens import LAYOUT
from zoo.distributed import on_first_rank
from zoo.errors import ZooError, expect_integer
from zoo.files import write_json, writing
from zoo.registry import load_tokenizer, tokenizers
from zoo.tokenizer import Tokenizer, config_fields
from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.weights import sha256_of


def pretokenize(cfg: DictConfig) -> dict:
    """Write output_dir/NUMBER.tar, each a part of the data in its order, and manifest.json; returns the manifest.

    A sample holds its ids (NAME.ids.npy), latents (NAME.latents.npy) or, of a KL autoencoder, the moments of its
    posterior (moments.npy), each with a leading axis of 1 or, with mirrored images, 2 views; where the length varies
    mask.npy; and as json the other fields of the data, the bytes that the picture had as a file ("image_bytes") and
    the grid of its tokens, if they have one. zoo.data.TokenDataset reads all that. An array of bfloat16 is stored as
    numbers of two bytes without a type ("V2"), since numpy has none for it. Shards that are there already are kept.
    Raises ZooError for what is wrong in the configuration, and when output_dir holds tokens of another protocol.
    """
    expect_one_of(cfg, "dtype", DTYPES)
    expect_one_of(cfg, "split", ("train", "val"))
    expect_one_of(cfg, "array_dtype", DTYPES)
    expect_integer("num_shards", cfg.num_shards, 1)
    tokenizer = load_tokenizer(cfg.tokenizer.name, weights=cfg.weights, **cli.changed_fields(cfg.tokenizer))
    data = instantiate(OmegaConf.to_container(cfg.data, resolve=True))
    source = data.train if cfg.split == "train" else data.val
    if source is None:
        raise ZooError(f"split={cfg.split}, and the data has none; choose the other split or other data.")
    fabric, folder = start(cfg), Path(cfg.output_dir)
    tokenizer.to(fabric.device, DTYPES[cfg.dtype])
    settings, *others = combinations(cfg.encode, tokenizer)
    if others:
        raise ZooError("encode has several values of a setting, and a folder holds the tokens of one; run each alone.")
    about = protocol(cfg)
    claim(fabric, folder, about)
    paths = [folder / f"{number:05d}.tar" for number in range(cfg.num_shards)]
    size_field = f"{tokenizer.info.input}_bytes"
    if taken := {"grid", size_field} & set(data.options.get("fields", ())):
        raise ZooError(f"data.fields cannot have {', '.join(taken)}, which is written anyway; leave it out.")
    options = data.options | {"fields": [*data.options.get("fields", (tokenizer.info.input,)), size_field]}
    mine, count, began = paths[fabric.global_rank :: fabric.world_size], 0, time.perf_counter()
    with Progress(transient=True, disable=not fabric.is_global_zero) as progress:
        for path in progress.track([path for path in mine if not path.is_file()], description=tokenizer.info.name):
            number = paths.index(path)  # of a shard, which has what a rank of so many would read
            loader = Loader(source, **options, rank=number, world_size=cfg.num_shards)
            count += write_shard(path, loader, tokenizer, settings, cfg)
    counts, seconds = on_first_rank([count]), time.perf_counter() - began
    shards = on_first_rank([(path.name, *about_shard(path, size_field)) for path in mine])
    manifest = None
    if shards is not None:
        speed = sum(counts) / seconds if sum(counts) else None  # None: all shards were there
        manifest = {"protocol": about, "tokenizer": about_tokenizer(tokenizer), "run": about_the_run(fabric)}
        manifest |= {"images_per_second": speed} | summed(sorted(shards, key=lambda shard: shard[0]))
        write_json(folder / "manifest.json", manifest)
        report(manifest)
        print(f"{manifest['samples']} samples in {len(paths)} shards; they and manifest.json are in {folder}")
    return fabric.broadcast(manifest)


def write_shard(path: Path, loader: Loader, tokenizer: Tokenizer, settings: dict, cfg: DictConfig) -> int:
    """One tar file; one that is there is a whole one. Returns the number of its samples."""
    count = 0
    with writing(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for batch in loader:
            images = batch.pop(tokenizer.info.input).to(tokenizer.device)
            views = [images, images.flip(-1)] if cfg.flip else [images]
            found = [arrays(tokenizer, view, settings, DTYPES[cfg.array_dtype]) for view in views]
            grid = {} if (grid := found[0].pop("grid", None)) is None else {"grid": grid}
            count += len(batch["key"])
            for i, key in enumerate(batch.pop("key")):
                # the first dot of a member's name ends the key; and no name leads out of a folder
                key = key.replace(".", "_").lstrip("/")
                for name in found[0]:
                    add(tar, f"{key}.{name}.npy", encoded(np.stack([view[name][i] for view in found])))
                fields = {name: plain(values[i]) for name, values in batch.items()} | grid
                add(tar, f"{key}.json", json.dumps(fields).encode())
    return count


@torch.no_grad()
def arrays(tokenizer: Tokenizer, images: Tensor, settings: dict, dtype: torch.dtype) -> dict:
    """What is stored of a batch, by name, each (B, ...), and the grid of its tokens."""
    if isinstance(tokenizer, KLTokenizer):
        moments = tokenizer.moments(tokenizer.config.to_values(tokenizer.check_images(images)))
        return {"moments": stored(moments, dtype)}
    tokens, sizes = tokenizer.encode(images, **settings).cpu(), tokenizer.info.codebook_sizes
    found = {f"{name}.ids": ids.numpy().astype(np.min_scalar_type(sizes[name] - 1)) for name, ids in tokens.ids.items()}
    found |= {f"{name}.latents": stored(latents, dtype) for name, latents in tokens.latents.items()}
    found |= {"mask": tokens.mask.numpy()} if tokenizer.info.variable_length else {}
    return found | {"grid": tokens.grid}


def stored(latents: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Latents as an array of that type. Raises ZooError for numbers that are too large for it."""
    latents = latents.cpu().to(dtype)
    if not latents.isfinite().all():
        raise ZooError(f"some latents are not finite as {dtype}; take array_dtype=bfloat16 or float32.")
    return latents.view(torch.int16).numpy().view("V2") if dtype == torch.bfloat16 else latents.numpy()


def encoded(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def plain(value):
    return value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value


def about_tokenizer(tokenizer: Tokenizer) -> dict:
    """What is needed to make Tokens of the arrays, and to know whose they are."""
    about = asdict(tokenizer.info)
    kept = ("name", "system", "kind", "streams", "codebook_sizes", "levels", "latent_dims")
    return {name: about[name] for name in kept} | {"config": config_fields(tokenizer.config)}


def about_shard(path: Path, size_field: str) -> tuple[dict, Counter]:
    """What the manifest has of a shard, and how many bytes the members of its samples have in all ("source": those of
    the images that they were made of)."""
    count, sizes, total = 0, Counter(), path.stat().st_size
    with path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        for _, name, start, size in members(read, 0, total):
            member = split_name(name)[1]
            sizes[member] += size
            if member == "json":
                count += 1
                sizes["source"] += json.loads(read(start, size))[size_field]
    return {"samples": count, "bytes": total, "sha256": sha256_of(path)}, sizes


def summed(shards: list[tuple[str, dict, Counter]]) -> dict:
    """Shards and their sums, which members a sample has, and how many bytes they take of an image."""
    sizes = sum((sizes for _, _, sizes in shards), Counter())
    samples = sum(about["samples"] for _, about, _ in shards)
    if not samples:
        raise ZooError("the data has no image that can be read; there is nothing to tokenise.")
    found = [member for member in sizes if member != "source"]
    sizes["shards"] = sum(about["bytes"] for _, about, _ in shards)
    return {
        "samples": samples,
        "members": found,
        "bytes_per_image": {name: size / samples for name, size in sizes.items()},
        "shards": {name: about for name, about, _ in shards},
    }


def report(manifest: dict) -> None:
    """Print what an image takes, beside the file that it came from."""
    sizes = manifest["bytes_per_image"]
    speed = manifest["images_per_second"]
    made = f"{speed:,.0f} images/s" if speed else "all shards were there"
    table = Table("", "bytes an image", "of its file", title=f"{manifest['tokenizer']['name']}: {made}")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {"source": "the file", "json": "other fields", "shards": "all, in the shards"}
    for name in ("source", *manifest["members"], "shards"):
        table.add_row(rows.get(name, name), f"{sizes[name]:,.0f}", f"{sizes[name] / sizes['source']:.2f}")
    Console().print(table)


def protocol(cfg: DictConfig) -> dict:
    """All that decides what is in the shards."""
    data = OmegaConf.to_container(cfg.data, resolve=True)
    for name in ("batch_size", "num_workers"):  # they do not
        data.pop(name, None)
    return {
        "layout": LAYOUT,
        "tokenizer": OmegaConf.to_container(cfg.tokenizer, resolve=True),
        "weights": about_file(tokenizers.weights_path(cfg.tokenizer.name, cfg.weights)),
        "data": data,
        "encode": OmegaConf.to_container(cfg.encode, resolve=True),
        "split": cfg.split,
        "num_shards": cfg.num_shards,
        "flip": cfg.flip,
        "array_dtype": cfg.array_dtype,
        "dtype": cfg.dtype,
    }


def main(argv: list[str] | None = None) -> int:
    return cli.run("pretokenize", pretokenize, cli.with_open_fields(argv, "encode"))
