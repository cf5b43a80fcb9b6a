"""What was measured as one report, and the tables that show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lightning.fabric import Fabric
from omegaconf import DictConfig

from zoo.commands.common import about_the_run
from zoo.commands.compare.measuring import budget, codec_file, encode_of, groups, rate_budgets, read
from zoo.metrics.codecs import NAMES as CODECS

COUNTED = ("tokens", "numbers", "bits", "codebook_use/", "perplexity/", "image_entropy/", "encode_", "decode_", "peak_")
"""How the names of measures begin that are none of the reconstruction's quality."""


def gathered(
    cfg: DictConfig, fabric: Fabric, protocol: dict, names: list[str], absent: list[str], failures: dict[str, dict]
) -> dict:
    """The content of compare.json, from the files of output_dir."""
    folder, measures, baselines = Path(cfg.output_dir), {}, {}
    entries = []
    for name in names:
        reports = {task: report for task in cfg.tasks if (report := read(folder / name / f"{task}.json"))}
        found = {task: report for task, report in reports.items() if "rows" in report}
        entry = {
            "name": name,
            "measured": list(found),
            "failed": failures[name],
            "lacks": {task: report["lacks"] for task, report in reports.items() if "lacks" in report},
            "encode": encode_of(cfg, name),
            "tokenizer": next((report["tokenizer"] for report in reports.values()), None),
            "weights": next((report["protocol"]["weights"] for report in found.values()), None),
            "runs": {task: report["run"] for task, report in found.items()},
        }
        for task, report in found.items():
            measures.setdefault(task, {}).update(report["measures"])
            own, *others = report["rows"]
            if task != "reconstruction":
                entry[task] = {key: own[key] for key in ("metrics", "missing")}
                entry[task]["images"] = report["protocol"]["images"]
                baselines.setdefault(task, {row["name"]: row["metrics"] for row in others})
        if "reconstruction" in found:
            report = found["reconstruction"]
            entry |= {key: report["protocol"][key] for key in ("images", "image_size", "split")}
            entry |= {"keys": report["keys"], "points": report["rows"]}
            pixels = math.prod(entry["image_size"])
            for point in entry["points"]:
                point["metrics"]["bits_per_pixel"] = point["metrics"]["bits"] / pixels
        entries.append(entry)
    report = {
        "protocol": protocol | {"tasks": list(cfg.tasks)},
        "run": about_the_run(fabric),
        "codecs": list(cfg.codecs),
        "measures": measures,
        "tokenizers": entries,
        "baselines": baselines,
        "curves": {},
        "absent": absent,
    }
    by_name = {entry["name"]: entry for entry in entries}
    for group in groups(cfg, names):
        pixels = math.prod(group.size)

        def result(codec: str, bits: float, group=group, pixels=pixels) -> dict:
            found = read(codec_file(folder, group, codec, bits))
            if "metrics" in found:
                found["metrics"]["bits_per_pixel"] = found["metrics"]["bits"] / pixels
            return found

        for name in group.names:
            for point in by_name[name]["points"]:
                point["codecs"] = {one: result(one, budget(point["metrics"]["bits"])) for one in cfg.codecs}
        curves = {one: [result(one, bits) for bits in rate_budgets(cfg, group.size)] for one in cfg.codecs}
        report["curves"][str(group)] = curves
    return report


class Cell(NamedTuple):
    value: float | str | None
    note: str = ""
    """More about it, or why there is no value."""


class Column(NamedTuple):
    title: str
    better: str = ""
    format: str = ""
    group: str = ""
    """The best of a row's values in columns of one group is marked, instead of the best of the column."""


@dataclass
class Table:
    """The first column is the name of a row's subject."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    baselines: list[list[Cell]] = field(default_factory=list)
    """Rows below the others, of which none is marked as the best."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Names that have no values, and why."""
    notes: list[str] = field(default_factory=list)

    def best(self) -> set[tuple[int, int]]:
        """Places (row, column) of the best values, where there are at least two to choose from."""
        found = set()
        for j, column in enumerate(self.columns):
            if column.better and not column.group:
                found |= _best(column.better, [(i, j, row[j].value) for i, row in enumerate(self.rows)])
        for i, row in enumerate(self.rows):
            grouped = [(column.group, j) for j, column in enumerate(self.columns) if column.group]
            for _, places in groupby(grouped, key=lambda one: one[0]):
                places = [j for _, j in places]
                found |= _best(self.columns[places[0]].better, [(i, j, row[j].value) for j in places])
        return found


def _best(better: str, places: Sequence[tuple[int, int, float | None]]) -> set[tuple[int, int]]:
    known = [place for place in places if isinstance(place[2], (int, float))]
    if len(known) < 2:
        return set()
    best = {"higher": max, "lower": min}[better](value for *_, value in known)
    return {(i, j) for i, j, value in known if value == best}


@dataclass
class Section:
    """Tokenizers that read the same kind of input, so that their numbers can be compared."""

    field: str
    title: str
    entries: list[dict]
    tables: list[Table]
    sizes: list[tuple[int, int]]

    @property
    def points(self) -> list[tuple[dict, dict]]:
        """Tokenizer and point, of all that can be drawn."""
        return all_points([entry for entry in self.entries if entry["tokenizer"] and decodes(entry)])


TITLES = {"image": "Images", "depth": "Depth maps"}


def sections(report: dict) -> list[Section]:
    """Images and depth maps, as far as there are some."""
    found = []
    for kind, title in TITLES.items():
        entries = [entry for entry in report["tokenizers"] if input_of(entry) == kind]
        if entries:
            makers = (reconstruction, equal_bits, understanding, codebooks, cost)
            tables = [table for make in makers for table in make(report, entries)]
            sizes = sorted({tuple(entry["image_size"]) for entry in entries if "image_size" in entry})
            found.append(Section(kind, title, entries, tables, sizes))
    return found


def input_of(entry: dict) -> str:
    """What a tokenizer reads; of one that could not be made, "image"."""
    return entry["tokenizer"]["input"] if entry["tokenizer"] else "image"


def decodes(entry: dict) -> bool:
    return entry["tokenizer"]["decodes_to"] != "embedding"


def all_points(entries: Iterable[dict]) -> list[tuple[dict, dict]]:
    """Each point that was measured, with its tokenizer."""
    return [(entry, point) for entry in entries for point in entry.get("points", ())]


def measure_column(measure: dict) -> Column:
    return Column(measure["title"], measure["better"], measure["format"])


def label(entry: dict, point: dict | None = None) -> str:
    settings = point["settings"] if point else {}
    return ", ".join([entry["name"], *(f"{name} {value}" for name, value in settings.items())])


def reconstruction(report: dict, entries: list[dict]) -> Iterable[Table]:
    measures = report["measures"].get("reconstruction", {})
    measured = [entry for entry in entries if "points" in entry]
    known = {name for entry in measured for point in entry["points"] for name in point["metrics"]}
    quality = {name: one for name, one in measures.items() if name in known and not name.startswith(COUNTED)}
    points = all_points(measured)
    notes = []
    for name in list(quality):
        reasons = {point["missing"].get(name) for entry, point in points if decodes(entry)}
        if len(reasons) == 1 and (reason := reasons.pop()):
            notes.append(f"{quality.pop(name)['title']}: {reason}")
    sized = len({tuple(entry["image_size"]) for entry in measured}) > 1
    if sized:
        notes.append("Image sizes differ: compare bits per pixel, and see that each is scored at its own size.")
    columns = [Column("tokenizer"), *([Column("image size")] if sized else [])]
    columns += [Column("tokens", "", ".4g"), Column("bits an image", "", ",.5g"), Column("bits per pixel", "", ".3f")]
    columns += [measure_column(one) for one in quality.values()]
    rows = []
    for entry, point in points:
        metrics = point["metrics"]
        spread = f"{metrics['tokens_p10']:.0f} to {metrics['tokens_p90']:.0f} for 80 % of the images"
        row = [Cell(label(entry, point), kind_of(entry))]
        row += [Cell("{} x {}".format(*entry["image_size"]))] if sized else []
        row.append(Cell(metrics["tokens_mean"], spread if entry["tokenizer"]["variable_length"] else ""))
        row += [Cell(metrics["bits"]), Cell(metrics["bits_per_pixel"])]
        lacking = "" if decodes(entry) else "decodes to an embedding, not to pixels"
        row += [Cell(metrics.get(name), point["missing"].get(name, lacking)) for name in quality]
        rows.append(row)
    failures = [(entry["name"], reason) for entry in entries for reason in entry["failed"].values()]
    if rows or failures:
        yield Table("Reconstruction", columns, rows, failures=failures, notes=notes)


def kind_of(entry: dict) -> str:
    about = entry["tokenizer"]
    books = [f"{size:,} codes" for size in about["codebook_sizes"].values()]
    widths = [f"latents of {width} values" for width in about["latent_dims"].values()]
    return f"{about['system']}: {' and '.join(dict.fromkeys(books + widths))}"


def equal_bits(report: dict, entries: list[dict]) -> Iterable[Table]:
    points = [(entry, point) for entry, point in all_points(entries) if "codecs" in point]
    if not points or not points[0][1]["codecs"]:
        return
    measures, codecs = report["measures"]["reconstruction"], list(points[0][1]["codecs"])
    shown = [name for name in ("psnr", "ssim", "lpips", "abs_rel") if any(p["metrics"].get(name) for _, p in points)]
    columns = [Column("tokenizer"), Column("bits an image", "", ",.5g")]
    for name in shown:
        title, better, form = (measures[name][key] for key in ("title", "better", "format"))
        columns += [Column(one, better, form, title) for one in ("tokenizer", *(CODECS[c] for c in codecs))]
    rows = []
    for entry, point in points:
        row = [Cell(label(entry, point)), Cell(point["metrics"]["bits"])]
        for name in shown:
            row.append(Cell(point["metrics"].get(name), point["missing"].get(name, "")))
            for codec in codecs:
                found = point["codecs"][codec]
                if "lacks" in found:
                    row.append(Cell(None, found["lacks"]))
                else:
                    how = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
                    row.append(Cell(found["metrics"].get(name), f"{how}: {found['metrics']['bits']:,.0f} bits"))
        rows.append(row)
    lacking = dict.fromkeys(f["lacks"] for _, p in points for f in p["codecs"].values() if "lacks" in f)
    notes = ["What a thumbnail, JPEG and WebP make of the images with at most as many bits."]
    yield Table("At equal bits", columns, rows, notes=[*notes, *(sentence(one) for one in lacking)])


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def understanding(report: dict, entries: list[dict]) -> Iterable[Table]:
    for task, title in (("probe", "Understanding: linear probe"), ("zeroshot", "Understanding: zero-shot, by texts")):
        able = [entry for entry in entries if task in entry]
        lacking = [entry["name"] for entry in entries if task in entry["lacks"]]
        if not able:
            continue
        measures = report["measures"][task]
        columns = [Column("tokenizer"), *(measure_column(one) for one in measures.values())]
        rows = [
            [Cell(entry["name"])]
            + [Cell(entry[task]["metrics"][name], entry[task]["missing"].get(name, "")) for name in measures]
            for entry in able
        ]
        baselines = report["baselines"][task]
        others = [[Cell(name), *(Cell(one.get(key)) for key in measures)] for name, one in baselines.items()]
        what = {"probe": "features", "zeroshot": "text side"}[task]
        notes = [f"Without {what}: {', '.join(lacking)}."] if lacking else []
        yield Table(title, columns, rows, others, notes=notes)


def codebooks(report: dict, entries: list[dict]) -> Iterable[Table]:
    columns = [
        Column("tokenizer"),
        Column("stream"),
        Column("codes", "", ",d"),
        Column("used", "higher", ".1%"),
        Column("perplexity", "", ",.1f"),
        Column("entropy, bits", "", ".2f"),
        Column("of the greatest", "higher", ".1%"),
        Column("within an image, bits", "", ".2f"),
    ]
    rows = []
    for entry, point in all_points(entries):
        metrics = point["metrics"]
        for stream, size in entry["tokenizer"]["codebook_sizes"].items():
            entropy = math.log2(metrics[f"perplexity/{stream}"])
            values = (size, metrics[f"codebook_use/{stream}"], metrics[f"perplexity/{stream}"])
            values += (entropy, entropy / math.log2(size), metrics[f"image_entropy/{stream}"])
            rows.append([Cell(label(entry, point)), Cell(stream), *map(Cell, values)])
    if rows:
        yield Table("Use of codebooks", columns, rows)


def cost(report: dict, entries: list[dict]) -> Iterable[Table]:
    measures = report["measures"].get("reconstruction", {})
    peak = next((name for name in measures if name.startswith("peak_")), None)
    shown = [name for name in ("encode_per_second", "decode_per_second", peak) if name in measures]
    columns = [Column("tokenizer"), Column("parameters", "", ",d"), *(measure_column(measures[name]) for name in shown)]
    rows = [
        [Cell(label(entry, point)), Cell(entry["tokenizer"]["parameters"])]
        + [Cell(point["metrics"].get(name)) for name in shown]
        for entry, point in all_points(entries)
    ]
    if rows:
        about = [entry["runs"]["reconstruction"] for entry in entries if "points" in entry]
        machines = dict.fromkeys(f"{one['devices']} x {one['device']}, {one['threads']} threads" for one in about)
        yield Table("Speed and memory", columns, rows, notes=[f"On {' and '.join(machines)}."])


def shown_as(cell: Cell, column: Column) -> str:
    """A value as tables write it."""
    if cell.value is None:
        return ""
    return f"{cell.value:{column.format}}" if isinstance(cell.value, (int, float)) else cell.value


def headline(report: dict) -> str:
    """One sentence on what was compared."""
    counts = sorted({entry["images"] for entry in report["tokenizers"] if "images" in entry})
    images = f"{' or '.join(map(str, counts))} images, " if counts else ""
    return f"{len(report['tokenizers'])} tokenizers, {images}{report['run']['date'][:10]}"


def absent(report: dict) -> str:
    return f"Without weights on this machine: {', '.join(report['absent'])}."
