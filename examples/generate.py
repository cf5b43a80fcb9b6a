"""Images of a class, made by xAR in the latents of its tokenizer.

python examples/generate.py --classes blue red --count 4 --guidance 2
"""

import argparse
from pathlib import Path

import torch
from torchvision.utils import save_image

import zoo
from zoo.commands.generate import class_numbers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--classes", nargs="+", default=["blue", "red"])
parser.add_argument("--count", type=int, default=4, help="images of each class")
parser.add_argument("--num-steps", type=int, default=25, help="network calls for each cell")
parser.add_argument("--guidance", type=float, default=2.0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("outputs/examples"))
args = parser.parse_args()

generator = zoo.load_generator("xar-tiny")
space = zoo.load_tokenizer(generator.info.tokenizer)
labels = torch.tensor(class_numbers(args.classes, generator.info.classes)).repeat_interleave(args.count)
randoms = [torch.Generator().manual_seed(args.seed + i) for i in range(len(labels))]  # one for each image
tokens = generator.generate(labels, num_steps=args.num_steps, guidance=args.guidance, generator=randoms)

args.output.mkdir(parents=True, exist_ok=True)
save_image(space.decode(tokens), args.output / "generated.png", nrow=args.count)
print(f"generated.png is in {args.output}, a row for each of {', '.join(args.classes)}")
