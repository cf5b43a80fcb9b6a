"""What the ids of SEED tell of the embedded scenes, and what the first k of them tell already.

    python -m zoo.tokenizers.seed.report [--name seed-tiny] [--weights FILE] [--decoder NAME] [--output DIR]

Retrieval of the 512 validation scenes and their captions: with the causal embedding before quantisation, and with ids
alone, of which the first k are known and the codes of the others are the mean over the training scenes at their place.
From the same codes: how near the decoded embedding comes to that of the encoder it was learned from, whether captions
are found with it in that encoder's space, and how near to the image the picture that is made of it. Writes report.json,
prefix.png (the curves) and pictures.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.utils import make_grid, save_image

import zoo
from zoo.data import read_all, scenes
from zoo.files import write_json
from zoo.metrics.retrieval import recalls_at_one
from zoo.tokenizers.seed.tokenizer import SeedTokenizer
from zoo.tokenizers.siglip.encoder import SigLIPEncoder, to_values

BATCH = 64
PICTURED = 128
"""Scenes of which pictures are made, which takes long."""
ENCODER = "siglip-tiny"
"""What the embedding that the codes learn is of."""
COLUMNS = {
    "ids": "ids known",
    "image_to_text": "image to text, recall at 1",
    "text_to_image": "text to image, recall at 1",
    "decoded_image_to_text": "by decoded embedding, image to text",
    "decoded_text_to_image": "text to image",
    "cosine": "cosine of decoded embedding",
    "explained": "variance of it explained",
    "picture_cosine": "cosine of picture's embedding (128 scenes)",
    "psnr": "PSNR of picture, dB (128 scenes)",
}


@torch.no_grad()
def in_batches(function, rows) -> Tensor:
    """What a function makes of rows, BATCH at once."""
    return torch.cat([function(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)])


def prefixes(count: int) -> list[int]:
    """0, 1, 2, 4, ... and all."""
    found, k = [0], 1
    while k < count:
        found.append(k)
        k *= 2
    return [*found, count]


class Report:
    """A tokenizer with a text side and a decoder, the encoder of its embedding, and the validation scenes."""

    def __init__(self, tokenizer: SeedTokenizer, encoder: SigLIPEncoder):
        self.tokenizer, self.encoder, size = tokenizer, encoder, tokenizer.config.image_size
        self.val = read_all(scenes("val"), ["image", "caption"], size)
        self.images, self.captions = self.val["image"], self.val["caption"]
        train = read_all(scenes("train"), ["image"], size)["image"]
        self.mean = in_batches(self.codes, train).mean(0)
        self.queries = in_batches(lambda images: tokenizer.query(tokenizer.to_values(images)), self.images)
        self.own = in_batches(self.codes, self.images)
        self.texts = in_batches(tokenizer.encode_text, self.captions)
        self.taught = in_batches(self.embed, self.images)
        self.taught_texts = in_batches(encoder.encode_text, self.captions)

    def codes(self, images: Tensor) -> Tensor:
        """(B, N, D)."""
        quantizer = self.tokenizer.quantizer
        return quantizer.codes(self.tokenizer.encode(images).ids["image"])

    def embed(self, images: Tensor) -> Tensor:
        """(B, E), not normalised."""
        return self.encoder.vision(to_values(images))

    def prefix(self, k: int) -> Tensor:
        """What both branches read (B, N, W) where the first k codes are known."""
        known = torch.arange(self.own.shape[1]) < k
        return in_batches(self.tokenizer.decoded, self.own.where(known[:, None], self.mean))

    def picture_scores(self, embedding: Tensor) -> dict[str, float]:
        """Of pictures that the decoder makes of embeddings (B, E), of the first scenes."""
        images, taught = self.images[:PICTURED], self.taught[:PICTURED]
        pictures = in_batches(self.tokenizer.decoder.decode, embedding[:PICTURED])
        errors = (pictures - images).square().flatten(1).mean(1)
        cosine = F.cosine_similarity(in_batches(self.embed, pictures), taught).mean()
        return {"picture_cosine": cosine.item(), "psnr": (-10 * errors.log10()).mean().item()}

    def row(self, k: int) -> dict[str, float]:
        """All numbers where the first k ids are known."""
        tokenizer, decoded = self.tokenizer, self.prefix(k)
        found = in_batches(lambda rows: tokenizer.to_text_space(tokenizer.reconstructed(rows)), decoded)
        embedding = in_batches(tokenizer.to_embedding, decoded)
        of_decoded = recalls_at_one(F.normalize(embedding, dim=-1), self.taught_texts, self.captions)
        variance = (self.taught - self.taught.mean(0)).square().mean()
        return {
            "ids": k,
            **recalls_at_one(F.normalize(found, dim=-1), self.texts, self.captions),
            **{f"decoded_{name}": value for name, value in of_decoded.items()},
            "cosine": F.cosine_similarity(embedding, self.taught).mean().item(),
            "explained": (1 - (embedding - self.taught).square().mean() / variance).item(),
            **self.picture_scores(embedding),
        }

    def before(self) -> dict[str, float]:
        """Retrieval with the causal embedding."""
        found = in_batches(self.tokenizer.to_text_space, self.queries)
        return {"ids": "none, before quantisation"} | recalls_at_one(
            F.normalize(found, dim=-1), self.texts, self.captions
        )

    def teacher(self) -> dict[str, float]:
        """What the encoder itself gets, and pictures of its own embedding."""
        found = recalls_at_one(F.normalize(self.taught, dim=-1), self.taught_texts, self.captions)
        return {
            "ids": f"none, {ENCODER}",
            **{f"decoded_{name}": value for name, value in found.items()},
            "cosine": 1.0,
            "explained": 1.0,
            **self.picture_scores(self.taught),
        }

    @torch.no_grad()
    def grid(self, count: int) -> Tensor:
        """Images, pictures of the encoder's embedding, and of all and of fewer ids, one row below the other."""
        decoder, some = self.tokenizer.decoder, slice(count)
        rows = [self.images[some], decoder.decode(self.taught[some])]
        for k in reversed(prefixes(self.own.shape[1])):
            rows.append(decoder.decode(self.tokenizer.to_embedding(self.prefix(k)[some])))
        return make_grid(torch.cat(rows), nrow=count)


def draw(path: Path, rows: list[dict], before: dict, teacher: dict) -> None:
    """Retrieval and reconstruction by the number of ids."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    numbers = [row["ids"] for row in rows]
    for name in ("image_to_text", "text_to_image"):
        (line,) = axes[0].plot(numbers, [row[name] for row in rows], "o-", label=COLUMNS[name])
        axes[0].axhline(before[name], color=line.get_color(), linestyle=":", label="before quantisation")
    for name in ("cosine", "explained", "picture_cosine"):
        axes[1].plot(numbers, [row[name] for row in rows], "o-", label=COLUMNS[name])
    axes[1].axhline(teacher["picture_cosine"], color="gray", linestyle=":", label=f"pictures of {ENCODER}'s embedding")
    for axis in axes:
        axis.set(xscale="symlog", xticks=numbers, xticklabels=numbers, xlabel="ids that are known")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="seed-tiny")
    parser.add_argument("--weights")
    parser.add_argument("--decoder", help="as tokenizer.decoder; default: the tokenizer's")
    parser.add_argument("--output", type=Path, default=Path("outputs/seed-report"))
    args = parser.parse_args()
    changes = {} if args.decoder is None else {"decoder": args.decoder}
    report = Report(zoo.load_tokenizer(args.name, args.weights, **changes), zoo.load_encoder(ENCODER))
    before, teacher = report.before(), report.teacher()
    rows = [report.row(k) for k in track(prefixes(report.tokenizer.info.max_tokens), "ids", transient=True)]
    table = Table(*COLUMNS.values(), title=f"{args.name}: {len(report.images)} scenes")
    for row in (*rows, before, teacher):
        cells = (row.get(name, "") for name in COLUMNS)
        table.add_row(*(f"{cell:.3f}" if type(cell) is float else str(cell) for cell in cells))
    Console(highlight=False).print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    content = {"name": args.name, "rows": rows, "before": before, "teacher": teacher}
    write_json(args.output / "report.json", content)
    draw(args.output / "prefix.png", rows, before, teacher)
    save_image(report.grid(10), args.output / "pictures.png")
    print(f"report.json, prefix.png and pictures.png are in {args.output}")


if __name__ == "__main__":
    main()
