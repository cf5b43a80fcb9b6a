"""compare.html, which needs no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from zoo.commands.common import ARROWS
from zoo.commands.compare.measuring import Group, budget, codec_file
from zoo.commands.compare.report import Section, absent, headline, label, shown_as
from zoo.metrics.codecs import NAMES as CODECS
from zoo.metrics.pictures import rate_distortion

INKS = {"light": "#2b2f36", "dark": "#c9cdd4"}
PLOTTED = ("psnr", "lpips", "abs_rel")


def page(report: dict, found: list[Section], folder: Path) -> str:
    """One HTML page that needs no other file."""
    environment = Environment(
        loader=PackageLoader("zoo.commands.compare", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"shown_as": shown_as, "arrows": ARROWS, "codec_names": CODECS}
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    environment.filters["runs"] = lambda columns: [(g, [*same]) for g, same in groupby(columns, key=lambda c: c.group)]
    return environment.get_template("page.html").render(
        report=report,
        headline=headline(report),
        sections=[
            {"section": section, "plots": list(plots(report, section)), "pictures": pictures(report, section, folder)}
            for section in found
        ],
        absent=absent(report) if report["absent"] else "",
    )


def plots(report: dict, section: Section) -> Iterator[dict]:
    """For each measure that was taken, its title and the plot against bits per pixel, for light and for dark pages."""
    sizes = [key for key in report["curves"] if key.startswith(f"{section.field} ")]
    for name in PLOTTED:
        curves = {}
        for entry, point in section.points:
            if (value := point["metrics"].get(name)) is not None:
                curves.setdefault(entry["name"], []).append((point["metrics"]["bits_per_pixel"], value, ""))
        if not curves:
            continue
        baselines = {}
        for size in sizes:
            for codec, results in report["curves"][size].items():
                title = CODECS[codec] + (f" {size.partition(' ')[2]}" if len(sizes) > 1 else "")
                known = [r["metrics"] for r in results if "metrics" in r and r["metrics"].get(name) is not None]
                if points := sorted({(one["bits_per_pixel"], one[name]) for one in known}):
                    baselines[title] = points
        title = report["measures"]["reconstruction"][name]["title"]
        drawn = {
            theme: svg(rate_distortion(curves, ("bits per pixel", title), baselines, True, ink))
            for theme, ink in INKS.items()
        }
        yield {"title": title, **drawn}


def svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def png(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def pictures(report: dict, section: Section, folder: Path) -> dict:
    """What the side-by-side table shows: "columns" of the same images, each a dict of views by name of lists.

    A view of an image is the URI of a picture, or for "tokens" a list of them by stream, or None.
    """
    points = section.points
    if not points or not (keys := points[0][0]["keys"]):
        return {"keys": [], "columns": [], "middle": ""}
    first = points[0][0]
    count = range(len(keys))
    original = [png(folder / first["name"] / "pictures" / "original" / f"{i}.png") for i in count]
    columns = [{"title": "original", "about": "", "kind": "original", "views": {"picture": original}, "shown": True}]
    for entry, point in points:
        own = folder / entry["name"] / "pictures" / str(entry["points"].index(point))
        streams = sorted({path.stem.partition(" ")[2] for path in own.glob("0 *.png")})
        views = {"picture": [png(own / f"{i}.png") for i in count]}
        views["tokens"] = [{stream: png(own / f"{i} {stream}.png") for stream in streams} for i in count]
        for codec in point.get("codecs", ()):
            views[codec] = compressed(folder, section, entry, point, codec, count)
        most = max(one["metrics"]["bits"] for one in entry["points"])
        shown = point["metrics"]["bits"] == most
        columns.append(column(label(entry, point), point["metrics"], "tokenizer", views, shown))
    middle = sorted(points, key=lambda one: one[1]["metrics"]["bits_per_pixel"])[len(points) // 2]
    for codec, found in middle[1].get("codecs", {}).items():
        if "metrics" in found:
            views = {"picture": compressed(folder, section, *middle, codec, count)}
            columns.append(column(CODECS[codec], found["metrics"], "codec", views))
    return {"keys": keys, "columns": columns, "middle": f"the bits of {label(*middle)}"}


def column(title: str, metrics: dict, kind: str, views: dict, shown: bool = True) -> dict:
    """A column of the side-by-side table; shown: at first, before the reader chooses."""
    psnr = "" if metrics.get("psnr") is None else f", {metrics['psnr']:.1f} dB"
    return {"title": title, "about": f"{metrics['bits']:,.0f} bits{psnr}", "kind": kind, "views": views, "shown": shown}


def compressed(folder: Path, section: Section, entry: dict, point: dict, codec: str, count: range) -> list[str | None]:
    group = Group(section.field, tuple(entry["image_size"]))
    path = codec_file(folder, group, codec, budget(point["metrics"]["bits"]))
    return [png(path.parent / path.stem / f"{i}.png") if "metrics" in point["codecs"][codec] else None for i in count]
