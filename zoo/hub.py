"""Parts from Hugging Face's hub, or from a local folder of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.errors import ZooError


def pretrained(kind: type, source: str | Path, **settings) -> Any:
    """`kind.from_pretrained(source, **settings)` of transformers: a hub id or a folder.

    Raises ZooError when it is not on this machine and cannot be downloaded, or is something else.
    """
    try:
        return kind.from_pretrained(source, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ZooError(
            f"'{source}' is not on this machine as a {kind.__name__} and cannot be downloaded ({reason}); give a "
            "hub id or a folder of its files."
        ) from error
