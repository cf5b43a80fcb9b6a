"""The one exception for wrong input, whatever its kind."""

import difflib
import math
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


def expect_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ZooError where a setting is no integer from `least` to `most`."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most}"
        raise ZooError(f"{name} must be an integer of at least {least}{limit}, got {shortened(value)}.")


def expect_number(name: str, value: object, least: float) -> None:
    """Raise ZooError where a setting is no finite number of at least `least`."""
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise ZooError(f"{name} must not be below {least:g}, and a finite number, got {shortened(value)}.")


def one_line(error: object, length: int = 300) -> str:
    """The first line of an error's message that is not empty; what libraries write below is for their authors."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:length]


def shortened(value: object, length: int = 80) -> str:
    """A value as a message shows it: what it is in one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[:length]}... ({type(value).__name__})"
