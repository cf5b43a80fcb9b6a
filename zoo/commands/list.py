"""`zoo list [PATTERN]`: the tokenizers, generators, encoders and decoders there are."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Column, Table

from zoo.errors import ZooError
from zoo.registry import KINDS, has_weights, system_of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("zoo list", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="names that match, for example 'karl*'")
    pattern = parser.parse_args(argv).pattern
    found = [(registry, name) for registry in KINDS for name in registry.list(pattern)]
    if not found:
        raise ZooError(f"nothing matches '{pattern}'; `zoo list` shows all.")
    whole = Column("name", overflow="fold")  # names are to be copied: never cut
    table = Table(whole, Column("system", no_wrap=True), "what", Column("weights", no_wrap=True))
    for registry, name in found:
        chosen = registry.preset(name)
        system = system_of(chosen.tokenizer)
        where = "by name" if has_weights(chosen) else "your file" if chosen.weights else "none"
        table.add_row(name, system, chosen.description, where)
    Console().print(table)
    return 0
