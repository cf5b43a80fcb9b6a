"""The one exception for wrong input, whatever its kind."""

import difflib
from collections.abc import Iterable


class ZooError(ValueError):
    """Wrong input from outside: an image, a name, a configuration, a file.

    The message is one sentence that says what was expected, what came and what to do. Commands print it
    alone and exit with 2; anything else that escapes a command is a bug and keeps its traceback.
    """


class NotThere(ZooError):
    """What a system does not have was asked of it: features, or a text side."""


def nearest(name: str, names: Iterable[str]) -> str:
    """End of a sentence about a misspelt name: "; did you mean A or B?", or the names there are when none is close."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are: {', '.join(names)}." if names else "."
