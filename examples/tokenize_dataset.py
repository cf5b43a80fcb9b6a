"""Write the tokens of a data set to shards once, and read them back without the images.

python examples/tokenize_dataset.py --tokenizer karl-tiny
"""

import argparse
from pathlib import Path

from torchvision.utils import save_image

import zoo
from zoo.commands import cli
from zoo.commands.pretokenize import pretokenize
from zoo.data import TokenDataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokenizer", default="karl-tiny", help="any tokenizer with weights")
parser.add_argument("--output", type=Path, default=Path("outputs/examples/tokens"))
args = parser.parse_args()

# The same as: zoo pretokenize tokenizer=karl-tiny split=val num_shards=2 ...
settings = ["split=val", "num_shards=2", "data.num_workers=0", "data.fields=[image,caption]"]
cfg = cli.compose("pretokenize", [f"tokenizer={args.tokenizer}", *settings, f"output_dir={args.output}"])
pretokenize(cfg)

dataset = TokenDataset(args.output, ["caption"], tokenizer=args.tokenizer)  # goes into any DataLoader
batch = dataset.collate([dataset[0]])
tokens = batch["tokens"]
print(f"{len(dataset)} samples; the first has {tokens.lengths.item()} tokens: {batch['caption'][0]}")
save_image(zoo.load_tokenizer(args.tokenizer).decode(tokens), args.output / "decoded.png")
print(f"decoded.png is in {args.output}")
