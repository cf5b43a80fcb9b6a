"""Images per second of reading pretokenised shards back against tokenising them, for every tokenizer with weights.

    python benchmarks/pretokenize.py [NAME ...] [--rounds 3] [--batch 64]

Both are of the 512 validation scenes with their captions, in one process and one after the other: `zoo pretokenize` as
it reports itself, and `zoo.data.TokenDataset` in a torch DataLoader, whose first round also opens the folder and reads
the headers of the shards. The table has that round and the best of the others, and
the bytes of an image's arrays beside those of its file.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from zoo.commands import cli
from zoo.commands.pretokenize import pretokenize
from zoo.data import TokenDataset
from zoo.registry import tokenizers


def tokenise(name: str, folder: Path) -> dict:
    """The manifest."""
    field = tokenizers.create(name).info.input
    data = ["data=scenes", f"data.fields=[{field},caption]", "data.num_workers=0", "split=val"]
    where = ["device=cpu", "num_shards=4", f"output_dir={folder}"]
    with contextlib.redirect_stdout(None):
        return pretokenize(cli.compose("pretokenize", [f"tokenizer={name}", *data, *where]))


def read(dataset: TokenDataset, batch: int) -> float:
    """Seconds of an epoch in random order."""
    begin = time.perf_counter()
    for _ in DataLoader(dataset, batch_size=batch, shuffle=True, collate_fn=dataset.collate):
        pass
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=tokenizers.list("*-tiny", pretrained=True))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("tokenizer", "made /s", "first read /s", "ratio", "read /s", "ratio", "bytes", "file")
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            manifest = tokenise(name, Path(folder))
            begin = time.perf_counter()
            dataset = TokenDataset(folder, ["caption"], tokenizer=name)
            first = time.perf_counter() - begin + read(dataset, args.batch)
            best = min(read(dataset, args.batch) for _ in range(args.rounds))
        speed, count, sizes = manifest["images_per_second"], manifest["samples"], manifest["bytes_per_image"]
        arrays = sum(sizes[member] for member in manifest["members"] if member != "json")
        ratios = [f"{value:,.0f}" for t in (first, best) for value in (count / t, count / t / speed)]
        table.add_row(name, f"{speed:,.0f}", *ratios, f"{arrays:,.0f}", f"{sizes['source']:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
