"""Errors of the user's input: one line that names the place, what was found, what was expected and the nearest fix."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping


class UserError(Exception):
    """The user's input is wrong. The message is one line; the command line prints it alone and exits with 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the known word closest to `word`, or '' where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextlib.contextmanager
def renaming_keys(names: Mapping[str, str]) -> Iterator[None]:
    """A `UserError` from within calls keys by the caller's names: {"data.source": "images", ...}."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for old, new in names.items():
            text = text.replace(old, new)
        raise UserError(text) from error
