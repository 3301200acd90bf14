"""Numbers of an architecture that can be read off the names and shapes of its tensors."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from addp_core.base.errors import UserError


def depth_of(names: Iterable[str], prefix: str) -> int:
    """Count the blocks named `<prefix>0.`, `<prefix>1.`, ..."""
    return 1 + max(
        (int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)), default=-1
    )


def is_square(tokens: int) -> bool:
    """Check whether the tokens can form a square grid."""
    return math.isqrt(tokens) ** 2 == tokens


def square_grid(source: str, tokens: int) -> tuple[int, int]:
    """Return the rows and columns of a square grid. Raises UserError if `tokens` is not a square number."""
    if not is_square(tokens):
        raise UserError(
            f"{source}: {tokens} positions do not form a square grid; expected a file that stores its image size"
        )
    return math.isqrt(tokens), math.isqrt(tokens)


def require_tensors(source: str, state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise UserError if a tensor is missing."""
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(f"{source}: missing tensors: {', '.join(missing)}")


def has_tensors(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that checks whether a state dict has all these tensors."""
    return lambda state: all(name in state for name in names)
