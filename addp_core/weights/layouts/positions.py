"""The grid of patches of a foreign ViT, which its positions tell only if the grid is square."""

import math

from torch import Tensor
from torch.nn import functional

from addp_core.base.errors import UserError
from addp_core.weights.assumptions import Assumption
from addp_core.weights.layouts.shapes import is_square

KEY = "img_size"  # the argument that tells the grid
Grid = tuple[int, int]  # rows and columns


def fit_positions(
    positions: Tensor, asked: Grid | None, layer_scale: bool
) -> tuple[Grid, Tensor, tuple[Assumption, ...]]:
    """Return the grid of a file's positions Float[1,P,W], these positions with one for the class token, and what was
    assumed.

    P is 1 + rows * columns, or rows * columns in DeiT III, whose class token has no position. Squares are preferred.

    Args:
        positions: the file's.
        asked: the grid of the size that the caller asks for, or None if the caller does not need the grid.
        layer_scale: whether the file has layer scales, as DeiT III and no plain ViT of (n-1) x (n+1) patches.
    """
    count = positions.shape[1]
    if is_square(count - 1):
        return (math.isqrt(count - 1),) * 2, positions, ()
    if asked is not None and asked[0] * asked[1] == count - 1:
        note = f"took its {count} positions for a class token and {asked[0]} x {asked[1]} patches, as in {KEY}"
        return asked, positions, (Assumption(KEY, note),)
    if is_square(count):
        side = math.isqrt(count)
        square = f"{side} x {side} patches without one for the class token (DeiT III)"
        note = f"took its {count} positions for {square}"
        demand = ""
        if asked != (side, side) and not layer_scale:
            rows, columns = _nearly_square(count - 1)
            demand = (
                f"its {count} positions fit {square} as well as a class token and {rows} x {columns} patches; expected "
                f"{KEY}=<the size it was trained at>, or a file of save_model, which stores the size"
            )
        known = () if layer_scale else (Assumption(KEY, note, demand=demand),)
        return (side, side), functional.pad(positions, (0, 0, 1, 0)), known
    demand = (
        f"its {count} positions do not form a square grid; expected {KEY}=<the size it was trained at>, or a file of "
        "save_model, which stores the size"
    )
    return _nearly_square(count - 1), positions, (Assumption(KEY, demand, demand=demand),)


def grid_of_table(source: str, table: Tensor, asked: Grid | None) -> Grid:
    """Return the grid that a table of relative biases Float[entries,heads] covers; three entries are the class token's.

    Raises UserError if it fits neither a square nor the grid that the caller asks for.
    """
    entries = len(table) - 3
    side = math.isqrt(entries)
    if side * side == entries and side % 2:
        return (side + 1) // 2, (side + 1) // 2
    if asked is not None and (2 * asked[0] - 1) * (2 * asked[1] - 1) == entries:
        return asked
    raise UserError(
        f"{source}: {len(table)} relative biases do not belong to a square grid; expected (2 side - 1)^2 + 3, or "
        f"{KEY}=<the size it was trained at>"
    )


def _nearly_square(patches: int) -> Grid:
    """Return the grid of this many patches that is nearest to a square."""
    rows = next(side for side in range(math.isqrt(patches), 0, -1) if patches % side == 0)
    return rows, patches // rows
