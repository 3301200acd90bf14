"""Errors in the user's input: one line that names the key or file, what was found, what was expected and the fix."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping


class UserError(Exception):
    """The user's input is wrong.

    The message is one line; the command line prints it without a traceback and exits with code 2.
    """


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the candidate most similar to `name`, or "" if none is similar."""
    similar = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {similar[0]!r}?" if similar else ""


@contextlib.contextmanager
def renaming_keys(names: Mapping[str, str]) -> Iterator[None]:
    """Replace keys in the message of a `UserError` from this block by the caller's: {"data.source": "images", ...}."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for old, new in names.items():
            text = text.replace(old, new)
        raise UserError(text) from error


@contextlib.contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Let the message of a `UserError` from this block begin with the key of the caller's recipe: "extractor: ..."."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
