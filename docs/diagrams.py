"""Draw how an image flows through each system: pictures/diagrams/SYSTEM.png.

python docs/diagrams.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parents[1] / "pictures/diagrams"
WIDTH, HEIGHT, COLUMN, ROW = 1.5, 0.72, 1.95, 1.15
"""Inches of a box, and from one to the next."""
COLOURS = {"data": "#ffffff", "learned": "#cfe5f5", "frozen": "#e4e4e4", "tokens": "#ffdf9e"}

# A system: its boxes (column, row, kind, text) by a letter, and arrows between them: "ab" from a to b, "a~b" dashed.
DIAGRAMS = {
    "aurora": (
        {
            "a": (0, 0, "data", "depth map"),
            "b": (1, 0, "learned", "convolutions"),
            "c": (2, 0, "tokens", "nearest of\n128 codes"),
            "d": (3, 0, "learned", "convolutions"),
            "e": (4, 0, "data", "depth map"),
            "f": (2, 1, "tokens", "words\n<DEPTH_17> ..."),
            "g": (3, 1, "learned", "language model"),
            "h": (4, 1, "data", "depth in words,\nthen the answer"),
        },
        "ab bc cd de cf fg gh",
    ),
    "seed": (
        {
            "a": (0, 0, "data", "image"),
            "b": (1, 0, "frozen", "image tower"),
            "c": (2, 0, "learned", "Q-Former,\ncausal queries"),
            "d": (3, 0, "tokens", "32 ids,\nin an order"),
            "e": (4, 0, "learned", "head"),
            "f": (5, 0, "data", "one embedding\nof the image"),
            "g": (6, 0, "frozen", "unCLIP"),
            "h": (7, 0, "data", "an image that\nmeans the same"),
            "t": (2, 1, "data", "captions find\nthe last query"),
            "l": (3, 1, "learned", "language model\nwrites them"),
        },
        "ab bc cd de ef fg gh t~c l~d",
    ),
    "dualtoken": (
        {
            "a": (0, 0, "data", "image"),
            "b": (1, 0, "learned", "early layers\nof SigLIP"),
            "c": (2, 0, "learned", "deeper layers"),
            "d": (3, 0, "tokens", "semantic ids,\nin levels"),
            "e": (4, 0, "learned", "last layers"),
            "f": (5, 0, "data", "embedding,\ncompared with"),
            "p": (2, 1, "tokens", "pixel ids,\nin levels"),
            "q": (3, 1, "learned", "convolutions"),
            "r": (4, 1, "data", "image"),
            "t": (5, 1, "frozen", "text tower"),
        },
        "ab bc cd de ef bp pq qr tf",
    ),
    "mingtok": (
        {
            "a": (0, 0, "data", "image"),
            "b": (1, 0, "learned", "encoder"),
            "c": (2, 0, "tokens", "latents, a short\nvector a patch"),
            "d": (3, 0, "learned", "causal\ntransformer"),
            "e": (4, 0, "data", "semantic\nfeatures"),
            "f": (5, 0, "learned", "pixel decoder"),
            "g": (6, 0, "data", "image"),
            "h": (2, 1, "learned", "flow head"),
            "l": (4, 1, "learned", "language model"),
        },
        "ab bc cd de ef fg el lh hc",
    ),
    "karl": (
        {
            "a": (0, 0, "data", "image, wanted\nerror, queries"),
            "f": (0, 1, "frozen", "2D tokenizer"),
            "b": (1, 0, "learned", "transformer"),
            "c": (2, 0, "tokens", "tokens, each:\nneeded or not"),
            "d": (3, 0, "data", "those that\nare needed"),
            "e": (4, 0, "learned", "transformer"),
            "g": (5, 0, "data", "grid of the\n2D tokenizer"),
            "h": (6, 0, "learned", "its decoder"),
            "i": (7, 0, "data", "image"),
        },
        "ab fb bc cd de eg gh hi",
    ),
    "ibq": (
        {
            "a": (0, 0, "data", "image"),
            "b": (1, 0, "learned", "convolutions"),
            "c": (2, 0, "learned", "products with\nall codes"),
            "d": (3, 0, "tokens", "the largest:\nan id, its code"),
            "e": (4, 0, "learned", "convolutions"),
            "f": (5, 0, "data", "image"),
            "s": (3, 1, "learned", "softmax: gradient\nfor every code"),
        },
        "ab bc cd de ef cs s~e",
    ),
    "ett": (
        {
            "a": (0, 0, "data", "image"),
            "b": (1, 0, "learned", "encoder"),
            "c": (2, 0, "tokens", "ids and their\nembeddings"),
            "d": (3, 0, "learned", "projector"),
            "e": (4, 0, "learned", "language model"),
            "f": (5, 0, "data", "caption"),
            "g": (3, 1, "learned", "decoder"),
            "h": (4, 1, "data", "image"),
        },
        "ab bc cd de ef cg gh",
    ),
    "xar": (
        {
            "a": (0, 0, "data", "class"),
            "b": (1, 1, "data", "cells before,\nnoisy in training"),
            "c": (1, 0, "learned", "block-causal\ntransformer"),
            "d": (2, 0, "learned", "flow from noise"),
            "e": (3, 0, "tokens", "next cell\nof latents"),
            "f": (4, 0, "frozen", "KL decoder"),
            "g": (5, 0, "data", "image"),
        },
        "ac bc cd de ef fg e~b",
    ),
    "vqgan": (
        {
            "a": (0, 0, "data", "image"),
            "b": (1, 0, "learned", "convolutions"),
            "c": (2, 0, "tokens", "nearest code"),
            "d": (3, 0, "learned", "convolutions"),
            "e": (4, 0, "data", "image"),
        },
        "ab bc cd de",
    ),
    "kl": (
        {
            "a": (0, 0, "data", "image"),
            "b": (1, 0, "learned", "convolutions"),
            "c": (2, 0, "tokens", "mean, variance\nof latents"),
            "d": (3, 0, "learned", "convolutions"),
            "e": (4, 0, "data", "image"),
        },
        "ab bc cd de",
    ),
    "siglip": (
        {
            "a": (0, 0, "data", "images"),
            "b": (1, 0, "learned", "vision tower"),
            "c": (2, 0, "data", "embeddings"),
            "t": (0, 1, "data", "texts"),
            "u": (1, 1, "learned", "text tower"),
            "v": (2, 1, "data", "embeddings"),
            "p": (3, 0, "data", "of every two:\na pair or not"),
        },
        "ab bc tu uv cp vp",
    ),
}


def draw(boxes: dict[str, tuple[int, int, str, str]], arrows: str, path: Path) -> None:
    """Boxes in columns and rows, and arrows between them, as a PNG."""
    columns, rows = (max(box[i] for box in boxes.values()) for i in (0, 1))
    size = columns * COLUMN + WIDTH + 0.2, rows * ROW + HEIGHT + 0.55
    figure = Figure(size)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-WIDTH / 2 - 0.1, size[0] - WIDTH / 2 - 0.1))
    axes.set_ylim(-HEIGHT / 2 - rows * ROW - 0.45, HEIGHT / 2 + 0.1)
    axes.set_axis_off()
    for column, row, kind, text in boxes.values():
        corner = column * COLUMN - WIDTH / 2, -row * ROW - HEIGHT / 2
        shape = {"boxstyle": "round,pad=0,rounding_size=0.1", "facecolor": COLOURS[kind], "edgecolor": "0.35"}
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, **shape))
        axes.text(column * COLUMN, -row * ROW, text, ha="center", va="center", fontsize=9)
    for arrow in arrows.split():
        (x0, y0), (x1, y1) = ((boxes[name][0] * COLUMN, -boxes[name][1] * ROW) for name in (arrow[0], arrow[-1]))
        across, down = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        start = (x0 + across * WIDTH / 2, y0) if across and down >= 0 else (x0, y0 + down * HEIGHT / 2)
        end = (x1 - across * WIDTH / 2, y1) if across and down <= 0 else (x1, y1 - down * HEIGHT / 2)
        style = {"arrowstyle": "-|>", "color": "0.25", "linestyle": "--" if "~" in arrow else "-", "shrinkA": 0}
        axes.annotate("", end, start, arrowprops=style | {"shrinkB": 0})
    for i, (kind, colour) in enumerate(COLOURS.items()):
        where = -WIDTH / 2 + 1.0 * i, -rows * ROW - HEIGHT / 2 - 0.38
        axes.add_patch(
            FancyBboxPatch(
                where, 0.16, 0.16, boxstyle="round,pad=0,rounding_size=0.03", facecolor=colour, edgecolor="0.35"
            )
        )
        axes.text(where[0] + 0.24, where[1] + 0.075, kind, va="center", fontsize=8, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    for name, (boxes, arrows) in DIAGRAMS.items():
        draw(boxes, arrows, FOLDER / f"{name}.png")
