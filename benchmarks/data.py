"""Samples per second of the loader against bare decoding of the same bytes by the same number of processes.

    python benchmarks/data.py [--count 2000] [--size 256] [--workers 2] [--rounds 5]

Bare decoding is Pillow and a float tensor for each sample: bytes in memory, nothing read, ordered or batched.
It and the loader take turns; the table has the best of the rounds. Without workers both run in this process.
"""

import argparse
import io
import json
import multiprocessing
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from zoo.data import Loader, scenes, shards
from zoo.data.loader import _begin_worker

FIELDS = {"jpg": "image", "rgb.webp": "image", "depth.png": "depth", "json": "caption"}


def make_shard(path: Path, count: int, size: int) -> str:
    """JPEGs of quality 90 of smooth noise, with as many bytes as photographs have."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
            fine = rng.normal(0, 6, (size, size, 1))
            pixels = np.asarray(coarse.resize((size, size), Image.BICUBIC)) + fine
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            info = tarfile.TarInfo(f"{i:06}.jpg")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    return str(path)


def bare(sample: dict[str, bytes]) -> dict:
    made = {}
    for suffix, data in sample.items():
        if suffix == "json":
            made[suffix] = json.loads(data)["caption"]
        elif suffix == "depth.png":
            inverse = 1 / np.asarray(Image.open(io.BytesIO(data)), np.float32)
            low, high = inverse.min(), inverse.max()
            made[suffix] = torch.from_numpy((inverse - low) / (high - low))[None]
        else:
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
            made[suffix] = torch.empty(3, *pixels.shape[:2]).copy_(pixels.permute(2, 0, 1)).div_(255)
    return made


def decode_all(samples: list[dict[str, bytes]]) -> None:
    for sample in samples:
        bare(sample)


def decoder_process(samples: list[dict[str, bytes]], barrier) -> None:
    torch.set_num_threads(1)
    _begin_worker(0)  # what the workers of the loader do
    while True:
        barrier.wait()
        decode_all(samples)
        barrier.wait()


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(source, fields: list[str], size: int, workers: int, rounds: int) -> tuple[float, float]:
    """(bare, loader) samples a second."""
    raws = [source.read(unit, i) for unit, count in enumerate(source.sizes) for i in range(count)]
    raws = [{s: data for s, data in raw.items() if FIELDS.get(s) in fields} for raw in raws]
    loader = Loader(source, batch_size=50, fields=fields, image_size=size, training=True, num_workers=workers)

    def load() -> None:
        for _ in loader:
            pass

    if workers:
        barrier = multiprocessing.Barrier(workers + 1)
        processes = [
            multiprocessing.Process(target=decoder_process, args=(raws[k::workers], barrier), daemon=True)
            for k in range(workers)
        ]
        for process in processes:
            process.start()

        def decode() -> None:
            barrier.wait()
            barrier.wait()
    else:

        def decode() -> None:
            decode_all(raws)

    decode(), load()  # starts the processes, fills the caches
    times = np.array([(timed(decode), timed(load)) for _ in range(rounds)]).min(0)
    if workers:
        for process in processes:
            process.terminate()
    return len(raws) / times[0], len(loader) * 50 / times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("data", "processes", "bare decoding /s", "loader /s", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        jpegs = shards(make_shard(Path(folder) / "jpegs.tar", args.count, args.size))
        for name, source, fields, size in (
            (f"JPEG {args.size}x{args.size}", jpegs, ["image"], args.size),
            ("scenes, image", scenes(), ["image"], 64),
            ("scenes, depth", scenes(), ["depth"], 64),
            ("scenes, image + depth + caption", scenes(), ["image", "depth", "caption"], 64),
        ):
            for workers in (0, args.workers):
                one, other = measure(source, fields, size, workers, args.rounds)
                processes = f"{workers} + main" if workers else "main"
                table.add_row(name, processes, f"{one:.0f}", f"{other:.0f}", f"{other / one:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
