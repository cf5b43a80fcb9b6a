"""`zoo info NAME`: everything the zoo knows about one tokenizer, generator, encoder or decoder."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from zoo.registry import kind_of, resource


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("zoo info", description=__doc__)
    parser.add_argument("name")
    name = parser.parse_args(argv).name
    registry = kind_of(name)
    chosen = registry.preset(name)
    with torch.device("meta"):
        made = registry.create(name)
    table = Table("", name, show_header=True, title=chosen.description)
    for key, value in asdict(made.info).items():
        if key != "name":
            table.add_row(key, str(value))
    table.add_row("parameters", f"{sum(p.numel() for p in made.parameters()):,}")
    table.add_row("configuration", "\n".join(f"{k} = {v!r}" for k, v in asdict(made.config).items()))
    weights = chosen.weights
    table.add_row("weights", "none published" if weights is None else weights.location or f"by hand: {weights.manual}")
    card = resource("checkpoints") / f"{name}.md"
    if card.is_file():
        table.add_row("card", str(card))
    Console().print(table)
    return 0
