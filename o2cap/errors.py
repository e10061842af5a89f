"""Whose fault it is: the person's input, or training that went wrong."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence that names the file, row or option and says what
    to do. The command line prints it and exits with code 2. It is no ValueError, which
    pydantic and tyro would put into words of their own.
    """


class TrainingError(RuntimeError):
    """Training itself went wrong (a loss that is no number); says where and why."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence that refuses `name`, with the nearest known ones."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{what} {name!r} does not exist.{hint} There are: {', '.join(names)}."
