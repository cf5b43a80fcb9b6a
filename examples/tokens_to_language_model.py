"""Images as words of a language model: captions and SEED's ids in one sequence, and back to text and pictures.

python examples/tokens_to_language_model.py
"""

import argparse
from pathlib import Path

import torch
from torchvision.utils import save_image

import zoo
from zoo.data import Loader, scenes
from zoo.lm.text import train_text_tokenizer
from zoo.vocabulary import Stream, Vocabulary

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--count", type=int, default=2, help="images in the sequence")
parser.add_argument("--output", type=Path, default=Path("outputs/examples"))
args = parser.parse_args()

batch = next(iter(Loader(scenes("val"), batch_size=args.count, fields=["image", "caption"])))
tokenizer = zoo.load_tokenizer("seed-tiny")
tokens = tokenizer.encode(batch["image"])  # ids (B, 32) with a causal order

words = train_text_tokenizer(batch["caption"])  # or any tokenizer of transformers
stream = Stream("image", tokenizer.info.codebook_sizes["image"], "<img_{:05d}>", begin="<img>", end="</img>")
vocabulary = Vocabulary(len(words), [stream])
vocabulary.extend_tokenizer(words)  # a model's embeddings: vocabulary.extend_embedding(lm)

pieces = []
for i, caption in enumerate(batch["caption"]):
    pieces += [words(caption)["input_ids"], tokens[i]]
ids = vocabulary.join(pieces)  # what a language model reads and is trained on
print(f"{len(ids)} ids of {len(vocabulary)}: {vocabulary.text_size} words of text, {len(vocabulary.words)} of images")
print(words.decode(ids[:60]), "...")

written = torch.stack(vocabulary.images_in(ids, "image", tokenizer.info.max_tokens))  # refuses what is no whole image
print("the images in it are those that were put in:", torch.equal(written, tokens.ids["image"]))
pictures = tokenizer.decode(zoo.Tokens(ids={"image": written}))
args.output.mkdir(parents=True, exist_ok=True)
save_image(torch.cat([batch["image"], pictures]), args.output / "images_as_words.png", nrow=args.count)
print(f"images_as_words.png is in {args.output}; SEED keeps what a picture means, not where things are")
