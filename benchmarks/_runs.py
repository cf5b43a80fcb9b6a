"""How benchmarks run the experiments of the zoo, and put what they find into pages."""

from pathlib import Path

from omegaconf import DictConfig

from zoo.commands.cli import compose
from zoo.registry import resource

BARE = [
    *(f"callbacks.{name}=null" for name in ("checkpoint", "best", "pictures", "progress", "ema")),
    "+trainer.enable_checkpointing=false", "+trainer.enable_progress_bar=false", "needs_weights=false",
]  # fmt: skip


def experiments() -> list[str]:
    return sorted(path.stem for path in (resource("conf") / "experiment").glob("*tiny*.yaml"))


def bare(name: str, *overrides: str) -> DictConfig:
    """An experiment that writes little beside its metrics and starts from nothing, also where a user's would not."""
    cfg = compose("train", [f"experiment={name}", *BARE, *overrides])
    if cfg.module.get("lm", "") is None:  # goes on from the language model of an earlier stage
        first = compose("train", ["experiment=ett-tiny-alignment"]).module
        cfg.module.lm, cfg.module.text_tokenizer = first.lm, first.text_tokenizer
    return cfg


def write_table(page: Path, name: str, header: list[str], rows: list[list[str]]) -> None:
    """Put a table between the marks <!-- NAME --> and <!-- end of NAME --> of a page."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    text = page.read_text()
    before, after = text[: text.index(begin)], text[text.index(end) :]
    page.write_text("\n".join([before + begin, "", *lines, "", after]))
