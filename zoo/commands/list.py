"""`zoo list [PATTERN]`: the tokenizers, generators, encoders and decoders there are."""

from __future__ import annotations

import argparse

from rich.console import Console

from zoo.errors import ZooError
from zoo.registry import KINDS, table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("zoo list", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="names that match, for example 'karl*'")
    pattern = parser.parse_args(argv).pattern
    found = [name for registry in KINDS for name in registry.list(pattern)]
    if not found:
        raise ZooError(f"nothing matches '{pattern}'; `zoo list` shows all.")
    Console().print(table(found))
    return 0
