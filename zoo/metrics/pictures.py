"""The picture of an evaluation: what went in, what came out, where they differ, and the tokens between."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox
from torch import Tensor

from zoo.files import writing
from zoo.tokenizer import Tokens

GOLDEN = 0.6180339887
"""Hues of neighbouring ids are this far apart on the circle, so that they never look alike."""
NOT_LIVE = 0.92
"""Grey of a place without a token."""
COLOURS = ("#2f7ed8", "#d9653b", "#2f9e63", "#b0559c", "#c29a1c", "#3aa6b9", "#8a6bd1", "#d1495b", "#7a8b3c", "#9c6b4a")
"""Of curves, to be told apart on white and on black."""


def draw_reconstructions(path: Path, images: Tensor, columns: dict[str, Tensor], tokens: Tokens) -> None:
    """Write a PNG with one image a line: the input, each reconstruction with its PSNR, the error, the tokens.

    images: (B, C, H, W) in [0, 1]; columns: reconstructions of the same form by name; the error map is that of the
    first, |difference| averaged over channels, on one scale for all lines.
    """
    images = images.float().cpu()
    columns = {name: column.float().cpu() for name, column in columns.items()}
    first = next(iter(columns.values()))
    error = (first - images).abs().mean(1)
    scale = max(error.max().item(), 1e-6)
    names = ["input", *columns, f"error, 0 to {scale:.2f}", "tokens"]

    shape, side = (len(images), len(names)), 1.9
    height, width = images.shape[-2:]
    figure = Figure((side * shape[1] + 0.2, side * shape[0] * height / width + 0.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    axes = figure.subplots(*shape, squeeze=False)
    for i, line in enumerate(axes):
        for axis, image in zip(line, [images[i], *(column[i] for column in columns.values())], strict=False):
            axis.imshow(*_shown(image), vmin=0, vmax=1, interpolation="nearest")
        for axis, column in zip(line[1:], columns.values(), strict=False):
            error_square = (column[i] - images[i]).square().mean().clamp(min=1e-10)
            axis.set_xlabel(f"{-10 * error_square.log10().item():.1f} dB", fontsize=8, labelpad=2)
        line[-2].imshow(error[i].numpy(), cmap="inferno", vmin=0, vmax=scale, interpolation="nearest")
        _draw_tokens(line[-1], tokens[i], height / width)
        for axis, name in zip(line, names, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(name, fontsize=9)
    with writing(path) as file:
        figure.savefig(file, dpi=110)


def draw_ranking(
    path: Path, images: Tensor, scores: Tensor, relevant: Tensor, texts: Sequence[str], count: int
) -> None:
    """Write a PNG with one image a line and beside it the texts that score highest, the right ones with a tick.

    images: (B, C, H, W) in [0, 1]; scores (M, K) and relevant (M, K) bool of M >= B images, these first, and K texts.
    """
    figure = Figure((8.5, 1.25 * len(images) + 0.2), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, width_ratios=(1, 6))
    for i, (picture, words) in enumerate(axes):
        picture.imshow(*_shown(images[i].float().cpu()), vmin=0, vmax=1, interpolation="nearest")
        for place, k in enumerate(scores[i].topk(min(count, len(texts))).indices.tolist()):
            mark, colour = ("✓", "tab:green") if relevant[i, k] else ("  ", "0.35")
            line = fill(f"{mark} {scores[i, k]:.3f}  {texts[k]}", 110, subsequent_indent=" " * 14)
            words.text(0, 1 - (place + 0.5) / count, line, color=colour, fontsize=7, va="center")
        for axis in (picture, words):
            axis.set_axis_off()
    with writing(path) as file:
        figure.savefig(file, dpi=110)


def draw_rate_distortion(path: Path, curves: dict[str, list[tuple[float, float, str]]], axes: tuple[str, str]) -> None:
    """Write a PNG with one curve per name through its points (x, y, text beside the point); axes: titles of x and y."""
    figure = rate_distortion(curves, axes)
    with writing(path) as file:
        figure.savefig(file, dpi=130)


def rate_distortion(
    curves: Mapping[str, Sequence[tuple[float, float, str]]],
    axes: tuple[str, str],
    baselines: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    logarithmic: bool = False,
    ink: str = "0.15",
) -> Figure:
    """A figure of curves, as `draw_rate_distortion` writes it, with names beside the curves.

    baselines: more curves, grey and without marks; logarithmic: the axis of x; ink: colour of axes and texts, for pages
    that are not white.
    """
    figure = Figure((6.4, 4.4), layout="constrained", facecolor="none")
    plot = figure.subplots()
    plot.set_facecolor("none")
    drawn = []
    for style, (name, points) in zip(("--", "-.", ":"), (baselines or {}).items(), strict=False):
        points = sorted(points)
        plot.plot(*zip(*points, strict=True), style, color="0.55", linewidth=1.3)
        drawn.append((name, "0.55", points))
    for number, (name, points) in enumerate(curves.items()):
        points, colour = sorted(points), COLOURS[number % len(COLOURS)]
        plot.plot([p[0] for p in points], [p[1] for p in points], "o-", markersize=5, color=colour)
        drawn.append((name, colour, [p[:2] for p in points]))
        for x, y, text in points:
            plot.annotate(text, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7, color=ink)
    if logarithmic:
        plot.set_xscale("log")
        plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        plot.xaxis.set_minor_formatter(NullFormatter())
    plot.margins(0.07)
    plot.set_xlabel(axes[0], color=ink)
    plot.set_ylabel(axes[1], color=ink)
    plot.tick_params(which="both", colors=ink)
    plot.grid(alpha=0.25, color="0.5")
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["bottom", "left"]].set_color(ink)
    _name(figure, plot, drawn)
    return figure


def _name(figure: Figure, plot: Axes, drawn: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]) -> None:
    """Write each name (name, colour, points of its curve) where it covers least of points, lines and other names."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    scale = renderer.points_to_pixels(1)
    lines = [plot.transData.transform(points) for *_, points in drawn]
    taken = [one for line in lines for one in _along(line, 3 * scale)]  # (x, y) on curves
    taken = np.concatenate(taken) if taken else np.empty((0, 2))
    leader = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
    inside, boxes = plot.get_window_extent(renderer), []
    for annotation in plot.texts:
        boxes.append(annotation.get_window_extent(renderer))
    for (name, colour, _), line in sorted(zip(drawn, lines, strict=True), key=lambda one: len(one[1])):
        text = plot.annotate(name, (0, 0), fontsize=8.5, color=colour, annotation_clip=False)
        size = text.get_window_extent(renderer)
        width, height = size.width, size.height
        best = None
        for point in line:
            for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
                for reach in (5, 12, 22, 34):
                    direction = np.array([np.cos(angle), np.sin(angle)])
                    center = point + direction * (reach * scale + np.array([width, height]) / 2)
                    box = Bbox.from_bounds(*(center - np.array([width, height]) / 2), width, height)
                    within = (taken > box.min - 2 * scale).all(1) & (taken < box.max + 2 * scale).all(1)
                    out = max(inside.x0 - box.x0, box.x1 - inside.x1, inside.y0 - box.y0, box.y1 - inside.y1, 0)
                    others = sum(box.padded(1.5 * scale).overlaps(other) for other in boxes)
                    cost = 3 * within.sum() + 200 * others + 5 * out / scale + 0.3 * reach
                    if best is None or cost < best[0]:
                        best = cost, box, point, reach
        _, box, point, reach = best
        boxes.append(box)
        text.set_visible(False)
        plot.annotate(
            name, plot.transData.inverted().transform(point), plot.transData.inverted().transform(box.min),
            fontsize=8.5, color=colour, annotation_clip=False,
            arrowprops=leader | {"color": colour} if reach > 12 else None,
        )  # fmt: skip
    for text in [text for text in plot.texts if not text.get_visible()]:
        text.remove()


def _along(line: np.ndarray, step: float) -> list[np.ndarray]:
    """Points (N, 2) on a line, `step` apart."""
    parts = [line]
    for begin, end in pairwise(line):
        count = max(int(np.hypot(*(end - begin)) / step), 1)
        parts.append(begin + np.linspace(0, 1, count + 1)[:, None] * (end - begin))
    return parts


def _shown(image: Tensor) -> tuple:
    """Arguments of imshow: RGB as it is, one channel in colours that keep its order."""
    return (image.movedim(0, -1).numpy(),) if len(image) == 3 else (image[0].numpy(), "viridis")


def token_maps(tokens: Tokens, aspect: float = 1.0) -> dict[str, np.ndarray]:
    """The tokens of one image as small pictures (rows, columns, 3) uint8 by stream and level.

    A pixel is a token, in raster order: ids by colour, latents by norm, grey where it is not live. aspect: height over
    width of the image, for tokens that are no raster.
    """
    live = tokens.mask[0].cpu().numpy()
    rows, columns = tokens.grid or _shape_of(len(live), aspect)
    maps = {}
    for name, ids in tokens.ids.items():
        ids = ids[0].cpu().numpy().reshape(len(live), -1)
        for level in range(ids.shape[1]):
            one = ids[:, level]
            hsv = [one * GOLDEN % 1, 0.45 + 0.4 * (one * GOLDEN**2 % 1), 0.7 + 0.3 * (one * GOLDEN**3 % 1)]
            maps[f"{name} {level + 1}" if ids.shape[1] > 1 else name] = hsv_to_rgb(np.stack(hsv, 1))
    for name, latents in tokens.latents.items():
        norms = latents[0].float().norm(dim=1).cpu().numpy()
        maps[name] = colormaps["viridis"](norms / max(norms[live].max(initial=0), 1e-12))[:, :3]
    for name, colours in maps.items():
        cells = np.full((rows * columns, 3), NOT_LIVE)
        cells[: len(live)][live] = colours[live]
        maps[name] = (cells * 255).round().astype(np.uint8).reshape(rows, columns, 3)
    return maps


def _shape_of(count: int, aspect: float) -> tuple[int, int]:
    columns = math.ceil(math.sqrt(count / aspect))
    return math.ceil(count / columns), columns


def _draw_tokens(axis, tokens: Tokens, aspect: float) -> None:
    """The first of their maps, with lines between them."""
    cells = next(iter(token_maps(tokens, aspect).values()))
    rows, columns = cells.shape[:2]
    axis.imshow(cells, extent=(0, columns, rows, 0), aspect=aspect * columns / rows)
    axis.vlines(range(1, columns), 0, rows, "white", linewidth=0.6)
    axis.hlines(range(1, rows), 0, columns, "white", linewidth=0.6)
