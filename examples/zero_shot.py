"""Texts that fit an image best, without training for it: by SigLIP, or by the ids of DualToken.

python examples/zero_shot.py --reader dualtoken-tiny --texts "a red cube" "two blue spheres" "a green ring"
"""

import argparse
from pathlib import Path

import torch

import zoo
from zoo.data import Loader, scenes
from zoo.metrics.pictures import draw_ranking

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--reader", default="siglip-tiny", help="an encoder, or a tokenizer with a text side")
parser.add_argument("--texts", nargs="+", help="default: the captions of 64 scenes")
parser.add_argument("--count", type=int, default=4, help="images to draw")
parser.add_argument("--output", type=Path, default=Path("outputs/examples"))
args = parser.parse_args()

load = zoo.load_encoder if args.reader in zoo.list_encoders() else zoo.load_tokenizer
reader = load(args.reader)
batch = next(iter(Loader(scenes("val"), batch_size=64, fields=["image", "caption"])))
texts = args.texts or batch["caption"]
similarity = reader.encode_image(batch["image"]) @ reader.encode_text(texts).T  # cosines (64, K)

own = torch.tensor([[text == caption for text in texts] for caption in batch["caption"]])
if not args.texts:
    found = own.gather(1, similarity.argmax(1, keepdim=True)).float().mean()
    print(f"{args.reader}: the caption of a scene is the nearest of {len(texts)} for {found:.0%} of the scenes")
args.output.mkdir(parents=True, exist_ok=True)
draw_ranking(args.output / "zero_shot.png", batch["image"][: args.count], similarity, own, texts, 3)
print(f"zero_shot.png is in {args.output}")
