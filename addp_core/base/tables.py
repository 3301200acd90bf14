"""Tables of text, for terminals, Markdown and LaTeX, and durations."""

import time
from collections.abc import Sequence

from tabulate import tabulate

Rows = Sequence[Sequence[str]]
KEEP_TEXT = {"disable_numparse": True, "preserve_whitespace": True}  # cells are text that is formatted already


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds as 02:03:04, after a day or more as 1d 02:03:04."""
    days = f"{int(seconds // 86400)}d " if seconds >= 86400 else ""
    return days + time.strftime("%H:%M:%S", time.gmtime(seconds % 86400))


def text_table(rows: Rows, left_columns: int = 1) -> str:
    """Return the rows as aligned columns, each line ending in a newline.

    Args:
        rows: cells of each line, the head included; lines may have fewer cells than the longest one.
        left_columns: how many columns are aligned to the left; the others hold numbers, aligned to the right.
    """
    table = tabulate(rows, tablefmt="plain", colalign=_alignment(rows, left_columns), **KEEP_TEXT)
    return "".join(f"{line.rstrip()}\n" for line in table.splitlines())


def markdown_table(rows: Rows) -> str:
    """Return a Markdown table whose first row is its head: the first column to the left, the others to the right."""
    return tabulate(rows[1:], rows[0], tablefmt="pipe", colalign=_alignment(rows, 1), **KEEP_TEXT)


def latex_table(rows: Rows) -> str:
    """Return a LaTeX table for the package booktabs whose first row is its head, aligned like `markdown_table`."""
    return tabulate(rows[1:], rows[0], tablefmt="latex_booktabs", colalign=_alignment(rows, 1), **KEEP_TEXT)


def _alignment(rows: Rows, left_columns: int) -> list[str]:
    columns = max(map(len, rows))
    return ["left" if i < left_columns else "right" for i in range(columns)]
