"""KARL spends as many tokens as an image needs: the same images at several qualities.

python examples/compare_lengths.py --qualities 0.03 0.06 0.12
"""

import argparse
from pathlib import Path

import zoo
from zoo.data import Loader, scenes
from zoo.metrics.pictures import draw_reconstructions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--qualities", type=float, nargs="+", default=[0.03, 0.06, 0.12], help="wanted mean absolute error")
parser.add_argument("--count", type=int, default=6)
parser.add_argument("--output", type=Path, default=Path("outputs/examples"))
args = parser.parse_args()

tokenizer = zoo.load_tokenizer("karl-tiny")
batch = next(iter(Loader(scenes("val"), batch_size=args.count, fields=["image", "count"])))
images, objects = batch["image"], batch["count"]

columns = {}
for quality in args.qualities:
    tokens = tokenizer.encode(images, quality=quality)
    columns[f"quality {quality:g}"] = tokenizer.decode(tokens)
    lengths = ", ".join(f"{n} ({c} objects)" for n, c in zip(tokens.lengths.tolist(), objects, strict=True))
    print(f"quality {quality:g}: tokens of each image {lengths}")

args.output.mkdir(parents=True, exist_ok=True)
draw_reconstructions(
    args.output / "lengths.png", images, columns, tokens
)  # grey: tokens of the last row that were dropped
print(f"lengths.png is in {args.output}")
