"""The picture of an evaluation: what went in, what came out, where they differ, and the tokens between."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import torch
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from zoo.files import writing
from zoo.tokenizer import Tokens

GOLDEN = 0.6180339887
"""Hues of neighbouring ids are this far apart on the circle, so that they never look alike."""


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
    figure = Figure((5.2, 3.8), layout="constrained")
    plot = figure.subplots()
    for name, points in curves.items():
        points = sorted(points)
        plot.plot([p[0] for p in points], [p[1] for p in points], "o-", markersize=4, label=name)
        for x, y, text in points:
            plot.annotate(text, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7)
    plot.set(xlabel=axes[0], ylabel=axes[1])
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False, fontsize=8)
    with writing(path) as file:
        figure.savefig(file, dpi=130)


def _shown(image: Tensor) -> tuple:
    """Arguments of imshow: RGB as it is, one channel in colours that keep its order."""
    return (image.movedim(0, -1).numpy(),) if len(image) == 3 else (image[0].numpy(), "viridis")


def _draw_tokens(axis, tokens: Tokens, aspect: float) -> None:
    """One square a token in raster order: ids (first stream and level) by colour, latents by norm, grey if not live."""
    live = tokens.mask[0].cpu()
    count = len(live)
    columns = math.ceil(math.sqrt(count / aspect))
    rows, columns = tokens.grid or (math.ceil(count / columns), columns)
    cells = torch.full((rows * columns, 3), 0.92)
    if tokens.ids:
        ids = next(iter(tokens.ids.values()))[0].cpu().reshape(count, -1)[:, 0]
        hsv = torch.stack([ids * GOLDEN % 1, 0.45 + 0.4 * (ids * GOLDEN**2 % 1), 0.7 + 0.3 * (ids * GOLDEN**3 % 1)], 1)
        colours = torch.from_numpy(hsv_to_rgb(hsv.numpy()))
    else:
        norms = next(iter(tokens.latents.values()))[0].float().norm(dim=1).cpu()
        colours = torch.from_numpy(colormaps["viridis"]((norms / norms[live].max().clamp(min=1e-12)).numpy()))[:, :3]
    cells[:count][live] = colours.to(cells.dtype)[live]
    axis.imshow(cells.view(rows, columns, 3).numpy(), extent=(0, columns, rows, 0), aspect=aspect * columns / rows)
    axis.vlines(range(1, columns), 0, rows, "white", linewidth=0.6)
    axis.hlines(range(1, rows), 0, columns, "white", linewidth=0.6)
