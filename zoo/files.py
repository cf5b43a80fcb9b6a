"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zoo.errors import ZooError, one_line, shortened

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says when a file has no room: the disk, a quota, or a limit of the process."""


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes `path` in one step at the end of the block.

    It is written under a hidden name in the same folder, synced to the disk and renamed. So a process that is killed,
    an error, or a machine that loses its power leaves at `path` what was there before. Raises ZooError when the file
    cannot be made or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")  # the same at each try, so that killed ones leave one behind at most
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("wb")
    except OSError as error:
        raise ZooError(f"cannot write {path} ({error.strerror}); choose another place for it.") from error
    try:
        with room_for(path):
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system syncs folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name
        finally:
            os.close(folder)


def expect_file(path: str | Path, what: str, advice: str = "check the path") -> Path:
    """The path of a regular file, ~ expanded. Raises ZooError for nothing, a folder, a pipe, links in a circle."""
    try:
        found = Path(path).expanduser()
        if found.is_file():
            return found
        reason = "is no regular file" if found.exists() else "does not exist"
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # links in a circle, ~nobody, no path, a null byte
        reason = f"cannot be read ({getattr(error, 'strerror', None) or one_line(error)})"
    raise ZooError(f"{what} {shortened(str(path), 200)} {reason}; {advice}.")


def discard_parts(folder: Path) -> None:
    """Remove what `writing` left in a folder and those below it when it was killed; nobody else writes there."""
    for part in folder.rglob(".*.part"):
        part.unlink()


@contextmanager
def room_for(path: str | Path) -> Iterator[None]:
    """Raises ZooError where the disk is full, whatever libraries made of the system's error."""
    try:
        yield
    except BaseException as error:
        cause = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in FULL):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise ZooError(
            f"cannot write {path} ({cause.strerror}); make room on its disk or choose another one, and start again."
        ) from error


def write_json(path: str | Path, content, allow_nan: bool = True) -> None:
    """Write a JSON file for people to read, as `writing` does."""
    with writing(path) as file:
        file.write((json.dumps(content, indent=2, allow_nan=allow_nan) + "\n").encode())
