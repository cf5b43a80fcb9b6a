"""What trained visual language models can do on the embedded scenes, in both directions.

    python -m zoo.lm.report --model FOLDER [--output outputs/lm-report] [--text-scale 3] [--top-p 0.5] [--device cuda]
    python -m zoo.lm.report --compare RUN RUN ... [--output outputs/lm-comparison]

Captions of the 512 validation pictures, greedy, are taken apart and compared with what is in the scene: a caption of
the scenes states the number of objects and names each of them by size, colour, material and shape, and so should these.
The order of the objects ("from left to right") is not judged.

Pictures of the 512 validation captions are judged in the same way: a network that was trained on the real training
scenes (zoo.lm.judge) names the objects that it sees, and they are compared with those of the caption. Pictures in
colour are judged by siglip-tiny as well, without training: by how well they and their captions find each other, and by
how often they fit their caption better than the same one with one colour, or one number, replaced by another. The same
judges on real pictures, and on what the visual tokenizer alone makes of them ("rebuilt"), say how much they can be
trusted. What can be had for nothing: the true caption and the written picture of another scene ("of others"), and what
is most frequent in training ("usual").

Writes report.json, pictures.safetensors (the first that were written) and pairs.png. With --compare each RUN is an
output_dir of `zoo train`, whose report goes to RUN/report and is kept, and --output receives one table of them all, see
zoo.lm.compare.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import zoo
from zoo import weights
from zoo.data import read_all, scenes
from zoo.data.labels import COLOR_NAMES
from zoo.data.render import NUMBERS, ROOM_COLORS
from zoo.errors import ZooError
from zoo.files import write_json, writing
from zoo.lm.facts import Facts, fact_scores, facts_of_caption, facts_of_scenes
from zoo.lm.generate import generate_image, generate_text
from zoo.lm.judge import SceneJudge, judge_file, load_judge, resized
from zoo.lm.model import VisualLM
from zoo.metrics.retrieval import Retrieval
from zoo.tokenizer import ImageReader
from zoo.tokenizers.siglip.text import contradict

BATCH = 64
ENCODER = "siglip-tiny"
LONGEST = 160
"""Words of a caption, at the most; those of the scenes have up to 65 of a vocabulary of 512."""
SHOWN = 8

REPLACED = {"colour": [COLOR_NAMES, *([color] for color in ROOM_COLORS)], "number": [NUMBERS[1:]]}
"""Words that exclude each other, by what they say; those of a list of one are left alone."""

UNSEEN = ("floor", "colour", "object")
"""What depth maps do not show: first words of names of scores."""


def caption_rows(captions: Sequence[str], train: dict, val: dict) -> dict[str, dict[str, float]]:
    """Scores of captions of the validation scenes, of true captions, those of another scene and its own, and of one
    who always says what is most frequent in training."""
    true, others = facts_of_scenes(val), val["caption"][1:] + val["caption"][:1]
    rows = {"model": captions, "of others": others, "true": val["caption"]}
    rows = {name: fact_scores(list(map(facts_of_caption, texts)), true) for name, texts in rows.items()}
    return rows | {"usual": usual(train, true)}


def picture_rows(
    pictures: dict[str, Tensor], captions: Sequence[str], judge: SceneJudge, encoder: ImageReader | None, train: dict
) -> dict[str, dict[str, float]]:
    """Scores of pictures (B, C, H, W), of which each shows its caption, by name; encoder: for those in colour."""
    expected = list(map(facts_of_caption, captions))
    texts = encoder and in_batches(encoder.encode_text, captions)
    rows = {}
    for name, images in pictures.items():
        seen = in_batches(judge.describe, images)
        rows[name] = fact_scores(seen, expected)
        del rows[name]["number named"]  # the judge states as many as it names
        within = [abs(one.count - other.count) <= 1 for one, other in zip(seen, expected, strict=True)]
        rows[name]["number, within one"] = sum(within) / len(within)
        if encoder:
            images = resized(images, encoder.config.image_size)
            metric = Retrieval((1, 5))
            metric.update(in_batches(encoder.encode_image, images), texts, captions)
            for key, one in metric.compute().items():
                rows[name][key.replace("_recall", ", recall").replace("_", " ")] = one.item()
            rows[name] |= preferred(encoder, images, captions)
    rows["usual"] = usual(train, expected)
    if judge.config.field == "depth":
        rows = {
            name: {key: one for key, one in row.items() if not key.startswith(UNSEEN)} for name, row in rows.items()
        }
    return rows


def usual(train: dict, true: Sequence[Facts]) -> dict[str, float]:
    """Scores of what is most frequent in training."""
    said = Counter(train["count"].tolist()).most_common(1)[0][0], Counter(train["floor"]).most_common(1)[0][0]
    scores = fact_scores([Facts(*said, Counter())] * len(true), true)
    return {name: scores[name] for name in ("number stated", "floor")}


def preferred(encoder: ImageReader, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of the images (B, 3, H, W) that are nearer to their caption than to the same one with a word replaced."""
    seen, texts = (in_batches(f, rows) for f, rows in ((encoder.encode_image, images), (encoder.encode_text, captions)))
    draws, scores = torch.rand(len(captions), 3, generator=torch.Generator().manual_seed(0)).tolist(), {}
    for name, words in REPLACED.items():
        false = [contradict(caption, words, row) for caption, row in zip(captions, draws, strict=True)]
        nearer = (seen * texts).sum(1) > (seen * in_batches(encoder.encode_text, false)).sum(1)
        scores[f"told from another {name}"] = nearer.double().mean().item()
    return scores


def in_batches(function: Callable, rows, title: str = ""):
    """What a function of a batch returns, for all rows: tensors as one, other things as a list."""
    starts = track(range(0, len(rows), BATCH), title, transient=True, disable=not title)
    parts = [function(rows[i : i + BATCH]) for i in starts]
    return torch.cat(parts).cpu() if isinstance(parts[0], Tensor) else [one for part in parts for one in part]


def written_captions(model: VisualLM, images: Tensor) -> list[str]:
    """Greedy captions of images (B, C, H, W) in [0, 1]."""
    room = min(LONGEST, model.context - model.bos - model.vision.words_of(written=False))
    return in_batches(lambda some: generate_text(model, some, max_new_tokens=room), images, "captions from images")


def written_images(model: VisualLM, captions: Sequence[str], **settings) -> Tensor:
    """Images (B, C, H, W) of captions; that of a caption is the same in every batch."""
    draws = iter([torch.Generator().manual_seed(number) for number in range(len(captions))])

    def write(texts: Sequence[str]) -> Tensor:
        return generate_image(model, texts, generator=[next(draws) for _ in texts], **settings).images.float()

    return in_batches(write, captions, "images from captions")


def about_tokens(model: VisualLM) -> dict[str, float]:
    """What an image takes: tokens, words that are read and written, and bits of what is written, each id log2 of its
    codebook and each value of a latent its 32 bits, per pixel of the tokenizer's own size; and what is learned."""
    vision, info = model.vision, model.vision.tokenizer.info
    sizes = [stream.levels * math.log2(stream.size) for stream in vision.standing(written=True)]
    bits = [32 * width for width in info.latent_dims.values()] or sizes
    return {
        "tokens": vision.length,
        "words read": vision.words_of(written=False),
        "words written": vision.words_of(written=True),
        "bits per pixel": vision.length * sum(bits) / info.image_size**2,
        "parameters learned": sum(p.numel() for p in (*model.lm.parameters(), *learned(model))),
    }


def learned(model: VisualLM) -> list[Tensor]:
    """Parameters of the visual side beside the tokenizer."""
    return [p for name, p in model.vision.named_parameters() if not name.startswith("tokenizer.")]


def draw_pairs(path: Path, images: Tensor, captions: Sequence[str], said: Sequence[str], shown: Tensor | None) -> None:
    """Write a PNG with one scene a line: its picture, the picture from its caption, both captions."""
    figure = Figure((10.5, 1.3 * len(images) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), 3, squeeze=False, width_ratios=(1, 1, 6))
    titles = "scene", "from its caption", "its caption, and the one from its picture (blue)"
    for i, line in enumerate(axes):
        for axis, image in zip(line, [images[i], *([] if shown is None else [shown[i]])], strict=False):
            show(axis, image)
        for text, place, color in ((captions[i], 0.98, "0.2"), (said[i], 0.46, "tab:blue")):
            shown_text = text.encode("ascii", "replace").decode()  # a model may say any bytes
            shown_text = "".join(one if one.isprintable() else "?" for one in shown_text)
            line[2].text(0, place, fill(shown_text, 118), color=color, fontsize=7, va="top", parse_math=False)
        for axis, title in zip(line, titles, strict=True):
            axis.set_axis_off()
            if i == 0:
                axis.set_title(title, fontsize=8, loc="left")
    with writing(path) as file:
        figure.savefig(file, dpi=110)


def show(axis, image: Tensor) -> None:
    """A picture (C, H, W) in [0, 1], in colour or grey."""
    pixels = image.movedim(0, -1).float().cpu().numpy()
    axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def report(model: VisualLM, train: dict, val: dict, output: Path, judge: SceneJudge | None = None, **settings) -> dict:
    """Measure a model on batches with the fields "count" and "floor" (train), and "caption", "objects" and what the
    tokenizer reads as well (val), write what was found and print it; settings: of generate_image."""
    info, device = model.vision.tokenizer.info, model.lm.device
    judge = (load_judge(judge_file(info.input)) if judge is None else judge).to(device)
    encoder = zoo.load_encoder(ENCODER, device=device) if info.input == "image" else None
    if info.channels != val[info.input].shape[1] or judge.config.field != info.input:
        raise ZooError(
            f"the report is about pictures in colour or depth maps; {info.name} reads {info.channels} channels."
        )
    images = resized(val[info.input], info.image_size)
    said, shown = written_captions(model, images), None
    tables = {"captions from images": caption_rows(said, train, val)}
    if model.vision.obstacle:
        print(f"no images are judged: {model.vision.obstacle}.")
    else:
        shown = written_images(model, val["caption"], **settings)
        rebuilt = in_batches(model.vision.reconstruct, images, "images from their own tokens")
        pictures = {"model": shown, "of others": shown.roll(1, 0), "rebuilt": rebuilt, "real": val[info.input]}
        tables["images from captions"] = picture_rows(pictures, val["caption"], judge, encoder, train)
        weights.save(output / "pictures.safetensors", {"pictures": shown[:SHOWN]})
    draw_pairs(output / "pairs.png", val[info.input][:SHOWN], val["caption"], said, shown)
    found = {
        "tokenizer": info.name,
        "input": info.input,
        "scenes": len(val["caption"]),
        "training_scenes": len(train["count"]),
        "settings": {"text_scale": model.vision.text_scale} | settings,
        **about_tokens(model),
        **tables,
        "captions": said,
    }
    write_json(output / "report.json", found)
    for title, rows in tables.items():
        table = Table(f"{title}: {info.name}", *rows)
        for measure in next(iter(rows.values())):
            table.add_row(measure, *(f"{row[measure]:.3f}" if measure in row else "" for row in rows.values()))
        Console(highlight=False).print(table)
    print(f"{len(val['caption'])} scenes; report.json and pairs.png are in {output}")
    return found


def read_scenes() -> tuple[dict, dict]:
    """What `report` takes of the training and of the validation scenes."""
    facts = ["caption", "count", "objects", "floor"]
    return read_all(scenes("train"), ["count", "floor"]), read_all(scenes("val"), ["image", "depth", *facts])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="a folder of VisualLM.save")
    what.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="output folders of zoo train")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--text-scale", type=float, help="guidance; default: of generate_image")
    parser.add_argument("--top-p", type=float, help="of ids; default: of generate_image")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    given = {"text_scale": args.text_scale, "top_p": args.top_p}
    settings = {name: value for name, value in given.items() if value is not None}
    if args.compare:
        from zoo.lm.compare import compare

        compare(args.compare, args.output or Path("outputs/lm-comparison"), args.device, **settings)
        return
    model = VisualLM.load(args.model, args.device)
    report(model, *read_scenes(), args.output or Path("outputs/lm-report"), **settings)


if __name__ == "__main__":
    main()
