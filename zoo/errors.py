"""The one exception for wrong input, whatever its kind."""

import difflib
from collections.abc import Iterable


class ZooError(ValueError):
    """Wrong input from outside: an image, a name, a configuration, a file.

    The message is one sentence that says what was expected, what came and what to do. Commands print it
    alone and exit with 2; anything else that escapes a command is a bug and keeps its traceback.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """End of a sentence about a misspelt name: "; did you mean A or B?", or the names there are when none is close."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are: {', '.join(names)}." if names else "."


def one_line(error: object, length: int = 300) -> str:
    """The first line of an error's message with something in it, which libraries follow by details for their authors."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:length]


def shortened(value: object, length: int = 80) -> str:
    """A value as a message shows it: what it is in one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[:length]}... ({type(value).__name__})"
