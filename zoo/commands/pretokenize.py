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
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import Tensor

from zoo.commands import cli
from zoo.commands.evaluate import DTYPES, about_the_run
from zoo.data import Loader
from zoo.errors import ZooError
from zoo.registry import load_tokenizer, tokenizers
from zoo.tokenizer import Tokenizer
from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.weights import sha256_of


def pretokenize(cfg: DictConfig) -> dict:
    """Write output_dir/NUMBER.tar, each part of the data in its order, and manifest.json; returns the manifest.

    A sample holds its ids (NAME.ids.npy), latents (NAME.latents.npy) or, of a KL autoencoder, the moments of its
    posterior (moments.npy), each with a leading axis of 1 or, with mirrored images, 2 views; where the length varies
    mask.npy; and the other fields of the data as json. Shards that are there already are kept. Raises ZooError for
    what is wrong in the configuration, and when output_dir holds tokens of another protocol.
    """
    check(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer.name, weights=cfg.weights, **cli.changed_fields(cfg.tokenizer))
    try:
        fabric = Fabric(accelerator=cfg.device, devices=cfg.devices, strategy=cfg.strategy)
    except (ValueError, TypeError) as error:
        raise ZooError(f"device={cfg.device} devices={cfg.devices} strategy={cfg.strategy}: {error}") from error
    fabric.launch()
    tokenizer.to(fabric.device, DTYPES[cfg.dtype])
    folder, about = Path(cfg.output_dir), protocol(cfg)
    if fabric.is_global_zero:
        begin(folder, about)
    fabric.barrier()
    data = instantiate(OmegaConf.to_container(cfg.data, resolve=True))
    source = data.train if cfg.split == "train" else data.val
    if source is None:
        raise ZooError(f"split={cfg.split} needs data that has one; this data has none.")
    names = [f"{number:05d}.tar" for number in range(cfg.num_shards)]
    mine = [
        n for n in range(cfg.num_shards)[fabric.global_rank :: fabric.world_size] if not (folder / names[n]).is_file()
    ]
    with Progress(transient=True, disable=not fabric.is_global_zero) as progress:
        for number in progress.track(mine, description=tokenizer.info.name):
            loader = Loader(source, **data.options, rank=number, world_size=cfg.num_shards)  # a shard is a rank's share
            write_shard(folder / names[number], loader, tokenizer, cfg)
    fabric.barrier()
    counts = {}
    for name in names:
        with tarfile.open(folder / name) as tar:
            counts[name] = sum(member.name.endswith(".json") for member in tar)
    manifest = {
        "protocol": about,
        "samples": sum(counts.values()),
        "shards": {name: {"samples": counts[name], "sha256": sha256_of(folder / name)} for name in names},
        "run": about_the_run(fabric),
    }
    if fabric.is_global_zero:
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        print(f"{manifest['samples']} samples in {len(names)} shards; they and manifest.json are in {folder}")
    return manifest


def write_shard(path: Path, loader: Loader, tokenizer: Tokenizer, cfg: DictConfig) -> None:
    """One tar file: written under a temporary name, so that a file that is there is a whole one."""
    part = path.with_name(path.name + ".part")
    with tarfile.open(part, "w") as tar:
        for batch in loader:
            images = batch.pop(tokenizer.info.input).to(tokenizer.device)
            views = [images, images.flip(-1)] if cfg.flip else [images]
            found = [arrays(tokenizer, view, np.dtype(cfg.array_dtype)) for view in views]
            keys = batch.pop("key")
            for i, key in enumerate(keys):
                for name in found[0]:
                    file = io.BytesIO()
                    np.lib.format.write_array(file, np.stack([view[name][i] for view in found]), allow_pickle=False)
                    add(tar, f"{key}.{name}.npy", file.getvalue())
                rest = {name: plain(values[i]) for name, values in batch.items()}
                add(tar, f"{key}.json", json.dumps(rest).encode())
    part.replace(path)


@torch.no_grad()
def arrays(tokenizer: Tokenizer, images: Tensor, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What is stored of a batch, by name, each (B, ...)."""
    if isinstance(tokenizer, KLTokenizer):
        values = tokenizer.config.to_values(tokenizer.check_images(images))
        moments = tokenizer.quant_conv(tokenizer.encoder(values))
        return {"moments": moments.float().cpu().numpy().astype(dtype)}
    tokens = tokenizer.encode(images).cpu()
    sizes = tokenizer.info.codebook_sizes
    found = {f"{name}.ids": ids.numpy().astype(np.min_scalar_type(sizes[name] - 1)) for name, ids in tokens.ids.items()}
    found |= {f"{name}.latents": z.float().numpy().astype(dtype) for name, z in tokens.latents.items()}
    return found | ({"mask": tokens.mask.numpy()} if tokenizer.info.variable_length else {})


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def plain(value):
    return value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value


def check(cfg: DictConfig) -> None:
    """Raise ZooError where a field of conf/pretokenize.yaml is not of its kind."""
    for name, known in (("dtype", tuple(DTYPES)), ("split", ("train", "val")), ("array_dtype", ("float16", "float32"))):
        if cfg[name] not in known:
            raise ZooError(f"{name} must be one of {', '.join(known)}, got {cfg[name]!r}.")
    if type(cfg.num_shards) is not int or cfg.num_shards < 1:
        raise ZooError(f"num_shards must be an integer of at least 1, got {cfg.num_shards!r}.")


def protocol(cfg: DictConfig) -> dict:
    """All that decides what is in the shards."""
    path = tokenizers.weights_path(cfg.tokenizer.name, cfg.weights)
    return {
        "tokenizer": OmegaConf.to_container(cfg.tokenizer, resolve=True),
        "weights": {"file": path.name, "sha256": sha256_of(path)},
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "split": cfg.split,
        "num_shards": cfg.num_shards,
        "flip": cfg.flip,
        "array_dtype": cfg.array_dtype,
        "dtype": cfg.dtype,
    }


def begin(folder: Path, about: dict) -> None:
    """Make the folder, or see that what is in it is of the same protocol."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "protocol.json"
    if path.is_file() and json.loads(path.read_text()) != about:
        raise ZooError(f"{folder} holds tokens of another protocol (see protocol.json); choose another output_dir.")
    path.write_text(json.dumps(about, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return cli.run("pretokenize", pretokenize, argv)
