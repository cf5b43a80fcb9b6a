"""Write the tokens of a data set to shards once, and read them back without the images.

python examples/tokenize_dataset.py --tokenizer karl-tiny
"""

import argparse
from pathlib import Path

import torch
import webdataset as wds
from torchvision.utils import save_image

import zoo
from zoo.commands import cli
from zoo.commands.pretokenize import pretokenize

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokenizer", default="karl-tiny", help="a tokenizer with one stream of ids")
parser.add_argument("--output", type=Path, default=Path("outputs/examples/tokens"))
args = parser.parse_args()

# The same as: zoo pretokenize tokenizer=karl-tiny split=val num_shards=2 ...
settings = ["split=val", "num_shards=2", "data.num_workers=0", "data.fields=[image,caption]"]
cfg = cli.compose("pretokenize", [f"tokenizer={args.tokenizer}", *settings, f"output_dir={args.output}"])
manifest = pretokenize(cfg)

shards = [str(args.output / name) for name in manifest["shards"]]
sample = next(iter(wds.WebDataset(shards, shardshuffle=False).decode()))
ids = torch.from_numpy(sample["image.ids.npy"]).long()  # (1, N), or (2, N) with mirrored images
mask = torch.from_numpy(sample["mask.npy"]) if "mask.npy" in sample else None
tokens = zoo.Tokens(ids={"image": ids}, mask=mask)
print(f"{sample['__key__']}: {tokens.lengths.item()} tokens of {ids.shape[1]}, {sample['json']['caption']}")
save_image(zoo.load_tokenizer(args.tokenizer).decode(tokens), args.output / "decoded.png")
print(f"decoded.png is in {args.output}")
