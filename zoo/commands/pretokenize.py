"""`zoo pretokenize`: a data set to webdataset shards of its tokens."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import Tensor

from zoo.commands import cli
from zoo.commands.common import DTYPES, about_file, about_the_run, claim, expect_one_of, start
from zoo.data import Loader
from zoo.distributed import on_first_rank
from zoo.errors import ZooError, expect_integer
from zoo.files import write_json, writing
from zoo.registry import load_tokenizer, tokenizers
from zoo.tokenizer import Tokenizer
from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.weights import sha256_of


def pretokenize(cfg: DictConfig) -> dict:
    """Write output_dir/NUMBER.tar, each a part of the data in its order, and manifest.json; returns the manifest.

    A sample holds its ids (NAME.ids.npy), latents (NAME.latents.npy) or, of a KL autoencoder, the moments of its
    posterior (moments.npy), each with a leading axis of 1 or, with mirrored images, 2 views; where the length varies
    mask.npy; and the other fields of the data as json. Shards that are there already are kept. Raises ZooError for
    what is wrong in the configuration, and when output_dir holds tokens of another protocol.
    """
    expect_one_of(cfg, "dtype", DTYPES)
    expect_one_of(cfg, "split", ("train", "val"))
    expect_one_of(cfg, "array_dtype", ("float16", "float32"))
    expect_integer("num_shards", cfg.num_shards, 1)
    tokenizer = load_tokenizer(cfg.tokenizer.name, weights=cfg.weights, **cli.changed_fields(cfg.tokenizer))
    data = instantiate(OmegaConf.to_container(cfg.data, resolve=True))
    source = data.train if cfg.split == "train" else data.val
    if source is None:
        raise ZooError(f"split={cfg.split}, and the data has none; choose the other split or other data.")
    fabric, folder = start(cfg), Path(cfg.output_dir)
    tokenizer.to(fabric.device, DTYPES[cfg.dtype])
    about = protocol(cfg)
    claim(fabric, folder, about)
    paths = [folder / f"{number:05d}.tar" for number in range(cfg.num_shards)]
    mine = paths[fabric.global_rank :: fabric.world_size]
    with Progress(transient=True, disable=not fabric.is_global_zero) as progress:
        for path in progress.track([path for path in mine if not path.is_file()], description=tokenizer.info.name):
            number = paths.index(path)  # of a shard, which has what a rank of so many would read
            loader = Loader(source, **data.options, rank=number, world_size=cfg.num_shards)
            write_shard(path, loader, tokenizer, cfg)
    shards = on_first_rank([(path.name, about_shard(path)) for path in mine])
    manifest = None
    if shards is not None:
        manifest = {"protocol": about, "run": about_the_run(fabric), "shards": dict(sorted(shards))}
        manifest["samples"] = sum(shard["samples"] for shard in manifest["shards"].values())
        write_json(folder / "manifest.json", manifest)
        print(f"{manifest['samples']} samples in {len(paths)} shards; they and manifest.json are in {folder}")
    return fabric.broadcast(manifest)


def about_shard(path: Path) -> dict:
    with tarfile.open(path) as tar:
        count = sum(member.name.endswith(".json") for member in tar)
    return {"samples": count, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_shard(path: Path, loader: Loader, tokenizer: Tokenizer, cfg: DictConfig) -> None:
    """One tar file; one that is there is a whole one."""
    with writing(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for batch in loader:
            images = batch.pop(tokenizer.info.input).to(tokenizer.device)
            views = [images, images.flip(-1)] if cfg.flip else [images]
            found = [arrays(tokenizer, view, np.dtype(cfg.array_dtype)) for view in views]
            for i, key in enumerate(batch.pop("key")):
                # the first dot of a member's name ends the key; and no name leads out of a folder
                key = key.replace(".", "_").lstrip("/")
                for name in found[0]:
                    add(tar, f"{key}.{name}.npy", encoded(np.stack([view[name][i] for view in found])))
                add(tar, f"{key}.json", json.dumps({name: plain(values[i]) for name, values in batch.items()}).encode())


@torch.no_grad()
def arrays(tokenizer: Tokenizer, images: Tensor, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What is stored of a batch, by name, each (B, ...)."""
    if isinstance(tokenizer, KLTokenizer):
        moments = tokenizer.moments(tokenizer.config.to_values(tokenizer.check_images(images)))
        return {"moments": moments.float().cpu().numpy().astype(dtype)}
    tokens, sizes = tokenizer.encode(images).cpu(), tokenizer.info.codebook_sizes
    found = {f"{name}.ids": ids.numpy().astype(np.min_scalar_type(sizes[name] - 1)) for name, ids in tokens.ids.items()}
    found |= {f"{name}.latents": z.float().numpy().astype(dtype) for name, z in tokens.latents.items()}
    return found | ({"mask": tokens.mask.numpy()} if tokenizer.info.variable_length else {})


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


def protocol(cfg: DictConfig) -> dict:
    """All that decides what is in the shards."""
    data = OmegaConf.to_container(cfg.data, resolve=True)
    for name in ("batch_size", "num_workers"):  # they do not
        data.pop(name, None)
    return {
        "tokenizer": OmegaConf.to_container(cfg.tokenizer, resolve=True),
        "weights": about_file(tokenizers.weights_path(cfg.tokenizer.name, cfg.weights)),
        "data": data,
        "split": cfg.split,
        "num_shards": cfg.num_shards,
        "flip": cfg.flip,
        "array_dtype": cfg.array_dtype,
        "dtype": cfg.dtype,
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return cli.run("pretokenize", pretokenize, argv)
