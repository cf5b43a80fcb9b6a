"""Parts from Hugging Face's hub, or from a local folder of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.errors import ZooError


def pinned(source: str | Path) -> tuple[str, dict[str, str]]:
    """Takes "owner/name@revision" apart: the hub id, and the commit, tag or branch as a setting of what downloads it.

    What has no revision, and folders, come back as they are with no setting.
    """
    name, at, revision = str(source).partition("@")
    return (name, {"revision": revision}) if at and not Path(source).exists() else (str(source), {})


def pretrained(kind: type, source: str | Path, **settings) -> Any:
    """`kind.from_pretrained(source, **settings)` of transformers: a hub id ("id@commit" for a revision) or a folder.

    Raises ZooError when it is not on this machine and cannot be downloaded, or is something else.
    """
    try:
        name, revision = pinned(source)
        return kind.from_pretrained(name, **revision, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ZooError(
            f"'{source}' is not on this machine as a {kind.__name__} and cannot be downloaded ({reason}); give a "
            "hub id or a folder of its files."
        ) from error
