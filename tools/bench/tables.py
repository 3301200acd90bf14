"""The tables of a report as files for a paper or a spreadsheet: CSV, and LaTeX for the package booktabs."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from addp_core.base.files import write_atomically
from addp_core.base.tables import latex_table
from tools.bench.document import Block, Heading, Table

FOLDER = "tables"  # in the folder of the bench


def write_tables(blocks: Sequence[Block], folder: Path) -> None:
    """Write each table to `folder` as <headings>.csv and <headings>.tex; a further one under a heading gets a number.

    Files of an earlier report are removed. Raises OSError if the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    names: Counter[str] = Counter()
    written = set()
    headings: dict[int, str] = {}  # level: text
    for block in blocks:
        if isinstance(block, Heading):
            headings = {level: text for level, text in headings.items() if level < block.level}
            headings[block.level] = block.text
        if isinstance(block, Table):
            name = re.sub(r"\W+", "-", " ".join(headings.values()).lower()).strip("-")
            names[name] += 1
            name += f"-{names[name]}" if names[name] > 1 else ""
            for suffix, text in ((".csv", _csv(block)), (".tex", _latex(block))):
                write_atomically(folder / f"{name}{suffix}", text.encode())
                written.add(f"{name}{suffix}")
    for path in folder.iterdir():
        if path.suffix in (".csv", ".tex") and path.name not in written:
            path.unlink()


def _csv(table: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table.text_rows(notes=False))
    return text.getvalue()


def _latex(table: Table) -> str:
    text = latex_table(table.text_rows())
    for sign, command in (("↑", r"$\uparrow$"), ("↓", r"$\downarrow$"), ("±", r"$\pm$")):
        text = text.replace(sign, command)
    return f"% needs \\usepackage{{booktabs}}\n{text}\n"
