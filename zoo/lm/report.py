"""What a trained visual language model can do on the embedded scenes, in both directions.

    python -m zoo.lm.report --model FOLDER [--output outputs/lm-report] [--text-scale 3] [--top-p 0.5] [--device cuda]

Captions of the 512 validation pictures, greedy, are taken apart and compared with what is in the scene: a caption of
the scenes states the number of objects and names each of them by size, colour, material and shape, and so should these.
The order of the objects ("from left to right") is not judged. Precision and recall are of objects over all scenes,
equal ones counted as often as they are named; exact is the share of scenes with every object and no other.

Pictures of the 512 validation captions are judged by linear maps, fitted on features (siglip-tiny, all patches side by
side) of the real training scenes, for the number of objects and the presence of each colour that the caption names
(area under the ROC curve), by how well they and their captions find each other, and by how often they fit their caption
better than the same one with one colour, or one number, replaced by another (siglip-tiny without training). The same
judge on real pictures, and on what the visual tokenizer alone makes of them ("rebuilt"), says how much it can be
trusted. What can be had for nothing: the true caption and the written picture of another scene ("of others"), and
what is most frequent in training ("usual").

Writes report.json and pairs.png.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import zoo
from zoo.data import read_all, scenes
from zoo.data.labels import ATTRIBUTES, COLOR_NAMES
from zoo.data.render import NUMBERS, ROOM_COLORS
from zoo.errors import ZooError
from zoo.files import write_json
from zoo.lm.generate import generate_image, generate_text
from zoo.lm.model import VisualLM
from zoo.metrics.probe import judge, most_frequent, probe_scores
from zoo.metrics.retrieval import Retrieval
from zoo.tokenizer import ImageReader
from zoo.tokenizers.siglip.text import contradict

BATCH = 64
JUDGE = "siglip-tiny"
LONGEST = 160
"""Words of a caption, at the most; those of the scenes have up to 65 of a vocabulary of 512."""
SHOWN = 8

ORDER = ("size", "color", "material", "shape")
"""In which a caption names the attributes of an object."""

REPLACED = {"colour": [COLOR_NAMES, *([color] for color in ROOM_COLORS)], "number": [NUMBERS[1:]]}
"""Words that exclude each other, by what they say; those of a list of one are left alone."""

_OBJECT = re.compile(
    rf"\b(a|{'|'.join(NUMBERS[1:])}) "
    + "".join(f"(?:({'|'.join(ATTRIBUTES[name])}) )?" for name in ORDER[:3])
    + rf"({'|'.join(ATTRIBUTES['shape'])})s?\b"
)
_COUNT = re.compile(rf"\b({'|'.join(NUMBERS)}) objects?\b")
_FLOOR = re.compile(rf"\b({'|'.join(ROOM_COLORS)}) floor\b")


class Facts(NamedTuple):
    """What a caption says, or a scene holds."""

    count: int | None
    """The number of objects as it is stated."""
    floor: str | None
    objects: Counter
    """(size, colour, material, shape) of each object that is named, "" for what is left out."""


def facts_of_caption(text: str) -> Facts:
    text = text.lower()
    count, floor, objects = _COUNT.search(text), _FLOOR.search(text), Counter()
    for number, *attributes in _OBJECT.findall(text):
        objects[tuple(attributes)] += 1 if number == "a" else NUMBERS.index(number)
    return Facts(count and NUMBERS.index(count[1]), floor and floor[1], objects)


def facts_of_scenes(batch: dict) -> list[Facts]:
    """Of a batch with the fields "count", "floor" and "objects"."""
    objects = [Counter(tuple(one[name] for name in ORDER) for one in found) for found in batch["objects"]]
    return [Facts(*facts) for facts in zip(batch["count"].tolist(), batch["floor"], objects, strict=True)]


def caption_scores(said: Sequence[Facts], true: Sequence[Facts]) -> dict[str, float]:
    """How right captions are; what is not stated is wrong."""
    pairs = list(zip(said, true, strict=True))
    scores = {
        "number stated": fmean(one.count == other.count for one, other in pairs),
        "number named": fmean(one.objects.total() == other.objects.total() for one, other in pairs),
        "floor": fmean(one.floor == other.floor for one, other in pairs),
    }
    for name, chosen in (("colour", (1,)), ("shape", (3,)), ("colour and shape", (1, 3)), ("object", (0, 1, 2, 3))):
        counts = [[_reduced(one.objects, chosen) for one in pair] for pair in pairs]
        right = sum((one & other).total() for one, other in counts)
        named, there = (sum(pair[k].total() for pair in counts) for k in (0, 1))
        scores[f"{name}, precision"], scores[f"{name}, recall"] = right / max(named, 1), right / max(there, 1)
        scores[f"{name}, exact"] = fmean(one == other for one, other in counts)
    return scores


def caption_rows(captions: Sequence[str], train: dict, val: dict) -> dict[str, dict[str, float]]:
    """Scores of captions of the validation scenes, of true captions, those of another scene and its own, and of one
    who always says what is most frequent in training."""
    true, others = facts_of_scenes(val), val["caption"][1:] + val["caption"][:1]
    rows = {"model": captions, "of others": others, "true": val["caption"]}
    rows = {name: caption_scores(list(map(facts_of_caption, texts)), true) for name, texts in rows.items()}
    usual = Counter(train["count"].tolist()).most_common(1)[0][0], Counter(train["floor"]).most_common(1)[0][0]
    constant = caption_scores([Facts(*usual, Counter())] * len(true), true)
    rows["usual"] = {name: constant[name] for name in ("number stated", "floor")}
    return rows


def picture_rows(
    pictures: dict[str, Tensor], captions: Sequence[str], encoder: ImageReader, train: dict
) -> dict[str, dict[str, float]]:
    """Scores of pictures (B, 3, H, W), of which each shows its caption, by name."""
    learned, expected = (asked(list(map(facts_of_caption, texts))) for texts in (train["caption"], captions))
    features = [in_batches(lambda images: encoder.features(images).flatten(1), train["image"], "training scenes")]
    features += [in_batches(lambda images: encoder.features(images).flatten(1), one) for one in pictures.values()]
    scores = probe_scores(features[0], learned, torch.cat(features[1:]))
    texts = in_batches(encoder.encode_text, captions)
    rows = {}
    for number, (name, images) in enumerate(pictures.items()):
        own = {key: one[number * len(images) :][: len(images)] for key, one in scores.items()}
        metric = Retrieval((1, 5))
        metric.update(in_batches(encoder.encode_image, images), texts, captions)
        found = {
            key.replace("_recall", ", recall").replace("_", " "): one.item() for key, one in metric.compute().items()
        }
        within = ((own["number"].argmax(1) - expected["number"]).abs() <= 1).double().mean().item()
        rows[name] = judge(own, expected) | {"number, within one": within} | found
        rows[name] |= preferred(encoder, images, captions)
    rows["usual"] = most_frequent(learned, expected)
    return rows


def preferred(encoder: ImageReader, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of the images (B, 3, H, W) that are nearer to their caption than to the same one with a word replaced."""
    seen, texts = (in_batches(f, rows) for f, rows in ((encoder.encode_image, images), (encoder.encode_text, captions)))
    draws, scores = torch.rand(len(captions), 3, generator=torch.Generator().manual_seed(0)).tolist(), {}
    for name, words in REPLACED.items():
        false = [contradict(caption, words, row) for caption, row in zip(captions, draws, strict=True)]
        nearer = (seen * texts).sum(1) > (seen * in_batches(encoder.encode_text, false)).sum(1)
        scores[f"told from another {name}"] = nearer.double().mean().item()
    return scores


def asked(captions: Sequence[Facts]) -> dict[str, Tensor]:
    """What pictures of captions that state a number are judged by: the number of objects, as classes from 0, and which
    colours are there (B, 8)."""
    named = [{color for _, color, *_ in facts.objects} for facts in captions]
    colors = torch.tensor([[color in found for color in COLOR_NAMES] for found in named])
    return {"number": torch.tensor([facts.count for facts in captions]) - 1, "colours": colors}


def in_batches(function: Callable, rows, title: str = ""):
    """What a function of a batch returns, for all rows: tensors as one, other things as a list."""
    starts = track(range(0, len(rows), BATCH), title, transient=True, disable=not title)
    parts = [function(rows[i : i + BATCH]) for i in starts]
    return torch.cat(parts).cpu() if isinstance(parts[0], Tensor) else [one for part in parts for one in part]


def written_captions(model: VisualLM, images: Tensor) -> list[str]:
    """Greedy captions of images (B, 3, H, W) in [0, 1]."""
    room = min(LONGEST, model.context - model.bos - model.vision.words_of(written=False))
    return in_batches(lambda some: generate_text(model, some, max_new_tokens=room), images, "captions from images")


def written_images(model: VisualLM, captions: Sequence[str], **settings) -> Tensor:
    """Images (B, 3, H, W) of captions; that of a caption is the same in every batch."""
    draws = iter([torch.Generator().manual_seed(number) for number in range(len(captions))])

    def write(texts: Sequence[str]) -> Tensor:
        return generate_image(model, texts, generator=[next(draws) for _ in texts], **settings).images.float()

    return in_batches(write, captions, "images from captions")


def draw_pairs(path: Path, images: Tensor, captions: Sequence[str], said: Sequence[str], shown: Tensor | None) -> None:
    """Write a PNG with one scene a line: its picture, the picture from its caption, both captions."""
    figure = Figure((10.5, 1.3 * len(images) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), 3, squeeze=False, width_ratios=(1, 1, 6))
    titles = "scene", "from its caption", "its caption, and the one from its picture (blue)"
    for i, line in enumerate(axes):
        for axis, image in zip(line, [images[i], *([] if shown is None else [shown[i]])], strict=False):
            axis.imshow(image.movedim(0, -1).float().cpu().numpy(), vmin=0, vmax=1, interpolation="nearest")
        for text, place, color in ((captions[i], 0.98, "0.2"), (said[i], 0.46, "tab:blue")):
            shown_text = "".join(one if one.isprintable() else "?" for one in text)  # a model may say any bytes
            line[2].text(0, place, fill(shown_text, 118), color=color, fontsize=7, va="top", parse_math=False)
        for axis, title in zip(line, titles, strict=True):
            axis.set_axis_off()
            if i == 0:
                axis.set_title(title, fontsize=8, loc="left")
    figure.savefig(path, dpi=110)


def report(model: VisualLM, train: dict, val: dict, output: Path, **settings) -> dict:
    """Measure a model on batches with the fields "image", "caption", "count", "objects" and "floor", write what was
    found and print it; settings: of generate_image."""
    info, encoder = model.vision.tokenizer.info, zoo.load_encoder(JUDGE, device=model.lm.device)
    if info.input != "image" or info.channels != 3:
        raise ZooError(f"the report is about pictures in colour, and {info.name} reads the field '{info.input}'.")
    images, side = resized(val["image"], info.image_size), encoder.config.image_size
    said, shown = written_captions(model, images), None
    tables = {"captions from images": caption_rows(said, train, val)}
    if model.vision.obstacle:
        print(f"no images are judged: {model.vision.obstacle}.")
    else:
        shown = written_images(model, val["caption"], **settings)
        rebuilt = in_batches(model.vision.reconstruct, images)
        pictures = {"model": shown, "of others": shown.roll(1, 0), "rebuilt": rebuilt, "real": val["image"]}
        pictures = {name: resized(one, side) for name, one in pictures.items()}
        seen = train | {"image": resized(train["image"], side)}
        tables["images from captions"] = picture_rows(pictures, val["caption"], encoder, seen)
    output.mkdir(parents=True, exist_ok=True)
    draw_pairs(output / "pairs.png", val["image"][:SHOWN], val["caption"], said, shown)
    found = {
        "tokenizer": info.name,
        "judge": JUDGE,
        "scenes": len(val["image"]),
        "training_scenes": len(train["image"]),
        "settings": {"text_scale": model.vision.text_scale} | settings,
        **tables,
        "captions": said,
    }
    write_json(output / "report.json", found)
    for title, rows in tables.items():
        table = Table(title, *rows)
        for measure in next(iter(rows.values())):
            table.add_row(measure, *(f"{row[measure]:.3f}" if measure in row else "" for row in rows.values()))
        Console(highlight=False).print(table)
    print(f"{len(val['image'])} scenes; report.json and pairs.png are in {output}")
    return found


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, C, S, S) to (B, C, side, side)."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def _reduced(objects: Counter, chosen: Sequence[int]) -> Counter:
    """Counts by some of the attributes alone."""
    found = Counter()
    for attributes, count in objects.items():
        found[tuple(attributes[k] for k in chosen)] += count
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of VisualLM.save")
    parser.add_argument("--output", type=Path, default=Path("outputs/lm-report"))
    parser.add_argument("--text-scale", type=float, help="guidance; default: of generate_image")
    parser.add_argument("--top-p", type=float, help="of ids; default: of generate_image")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = VisualLM.load(args.model, args.device)
    fields = ["image", "caption", "count", "objects", "floor"]
    train, val = (read_all(scenes(split), fields) for split in ("train", "val"))
    given = {"text_scale": args.text_scale, "top_p": args.top_p}
    report(model, train, val, args.output, **{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    main()
