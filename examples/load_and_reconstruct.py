"""Load a tokenizer by name, turn images into tokens and back, and look at both.

python examples/load_and_reconstruct.py --tokenizer vqgan-tiny
python examples/load_and_reconstruct.py --tokenizer ibq-tiny --folder my/photographs
"""

import argparse
from pathlib import Path

import zoo
from zoo.data import Loader, folder, scenes
from zoo.metrics.pictures import draw_reconstructions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokenizer", default="vqgan-tiny", help="a name of `zoo list` that has weights")
parser.add_argument("--folder", help="with your own images; default: the embedded scenes")
parser.add_argument("--count", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("outputs/examples"))
args = parser.parse_args()

tokenizer = zoo.load_tokenizer(args.tokenizer)
info = tokenizer.info
source = folder(args.folder, info.input) if args.folder else scenes("val")
batch = next(iter(Loader(source, batch_size=args.count, fields=[info.input], image_size=info.image_size)))
images = batch[info.input]  # float (B, C, H, W) in [0, 1]

tokens = tokenizer.encode(images)
reconstructions = tokenizer.decode(tokens)
for stream, ids in tokens.ids.items():
    print(f"stream {stream!r}: ids {tuple(ids.shape)} of {info.codebook_sizes[stream]} codes")
for stream, latents in tokens.latents.items():
    print(f"stream {stream!r}: latents {tuple(latents.shape)}")

args.output.mkdir(parents=True, exist_ok=True)
tokens.save(args.output / "tokens.safetensors")  # zoo.Tokens.load reads it
draw_reconstructions(args.output / "reconstructions.png", images, {info.name: reconstructions}, tokens)
print(f"tokens.safetensors and reconstructions.png are in {args.output}")
