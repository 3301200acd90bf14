"""Headings, tables, images and curves, written as one self-contained HTML file and as Markdown.

The HTML comes from templates/report.html.j2. It holds its images as data URIs and its style sheet; it has no script and
loads nothing. Texts are plain: the template and the Markdown writer escape them.
"""

import base64
import functools
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import quote

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL.Image import Image as PillowImage

NONE = "-"  # a cell without a value
LONG_TEXT = 24  # characters of a cell, above which its column is one of texts
MAX_SIDE = 1000  # of an image in the HTML, in pixels; larger ones are scaled down
SMALL_WIDTH = 240  # narrower images are enlarged by whole numbers up to this, without smoothing


@dataclass(frozen=True)
class Cell:
    """A cell of a table. note: in small print below the text; tone: of the note, good, bad or ""."""

    text: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table. kind: "" (measured), "chance", "paper" (published numbers) or "sum"; each has its style."""

    contents: Sequence[Cell | str]
    kind: str = ""

    @property
    def cells(self) -> list[Cell]:
        return [content if isinstance(content, Cell) else Cell(content) for content in self.contents]


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3; those of level 2 are in the table of contents."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. tone: "" or "warn"."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table. groups: (name, number of columns) in a line above the head, which cover all columns; "" names no group.

    left_aligned: for cells that hold words instead of numbers.
    """

    head: Sequence[str]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()
    caption: str = ""
    left_aligned: bool = False

    @property
    def text_columns(self) -> set[int]:
        """The columns after the first that hold long texts, which wrap and are aligned left."""
        cells = ((i, cell) for row in self.rows for i, cell in enumerate(row.cells) if i)
        return {i for i, cell in cells if len(cell.text) > LONG_TEXT}

    def text_rows(self, notes: bool = True) -> list[list[str]]:
        """Return the cells of each line, the head first, with the groups' names; with `notes`, these in parentheses."""
        names = [name for name, columns in self.groups for _ in range(columns)] or [""] * len(self.head)
        rows = [[" ".join(filter(None, pair)) for pair in zip(names, self.head, strict=True)]]
        for row in self.rows:
            rows.append([f"{cell.text} ({cell.note})" if notes and cell.note else cell.text for cell in row.cells])
        return rows


@dataclass(frozen=True)
class Images:
    """(file, caption) of each image; a file that is missing or not an image is named instead."""

    files: Sequence[tuple[Path, str]]


@dataclass(frozen=True)
class Drawings:
    """(SVG, what it shows) of each drawing; only the HTML shows them."""

    drawings: Sequence[tuple[bytes, str]]


@dataclass(frozen=True)
class Listing:
    """Text in fixed width, folded behind its title unless it is `open`."""

    title: str
    text: str
    open: bool = False


Block: TypeAlias = Heading | Text | Table | Images | Drawings | Listing


# -------------------- HTML


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Return the page: the blocks before the first heading, the table of contents, and the other blocks."""
    kinds_and_blocks = [(type(block).__name__, block) for block in blocks]
    first = next((i for i, block in enumerate(blocks) if isinstance(block, Heading)), len(blocks))
    return _template().render(
        title=title,
        introduction=kinds_and_blocks[:first],
        sections=kinds_and_blocks[first:],
        contents=[block for block in blocks if isinstance(block, Heading) and block.level == 2],
        embed=_embed,
        svg_uri=lambda svg: _data_uri("image/svg+xml", svg),
    )


@functools.cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tools.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2")


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in the HTML: its data URI, and the width that it is shown at, 0 for its own; or why it is not there."""

    uri: str = ""
    width: int = 0
    problem: str = ""


def _embed(path: Path) -> EmbeddedImage:
    """Read an image and scale it down if it is large."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        return EmbeddedImage(problem=f"{path.name}: {error.strerror or 'not an image'}")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    png, jpeg = (_encode(image, kind) for kind in ("png", "jpeg"))
    # flat or tiny images are smaller, or nearly so, without loss
    uri = _data_uri("image/png", png) if len(png) < 2 * len(jpeg) else _data_uri("image/jpeg", jpeg)
    enlarged = image.width * (SMALL_WIDTH // image.width) if image.width * 2 <= SMALL_WIDTH else 0
    return EmbeddedImage(uri, enlarged)


def _encode(image: "PillowImage", kind: str) -> bytes:
    with io.BytesIO() as file:
        if kind == "png":
            image.save(file, kind, optimize=True)
        else:
            image.save(file, kind, quality=88)
        return file.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# -------------------- Markdown


def to_markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """Return the same in Markdown, for a file in `folder`: images by relative links, drawings only by their names."""
    parts = [_markdown(block, folder) for block in (Heading(title, 1), *blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escape(block.text)}"
        case Text():
            return f"**{_escape(block.text)}**" if block.tone else _escape(block.text)
        case Table():
            return _markdown_table(block)
        case Drawings():
            return f"Drawn in the HTML: {'; '.join(_escape(about) for _, about in block.drawings)}."
        case Images():
            return "\n".join(_markdown_image(path, caption, folder) for path, caption in block.files)
        case Listing():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", block.text)), default=0))
            return f"{_escape(block.title)}:\n\n{fence}\n{block.text}\n{fence}"
        case _:
            raise TypeError(f"{type(block).__name__} cannot be written as Markdown")


def _markdown_image(path: Path, caption: str, folder: Path) -> str:
    if not path.is_file():
        return f"({_escape(path.name)} is not there)"
    return f"![{_escape(caption)}]({quote(os.path.relpath(path, folder))})"


def _markdown_table(table: Table) -> str:
    head, *rows = table.text_rows()
    lines = [[_escape(name) for name in head], ["---", *["---:"] * (len(head) - 1)]]
    for row, texts in zip(table.rows, rows, strict=True):
        lines.append([f"*{_escape(text)}*" if row.kind == "paper" and text else _escape(text) for text in texts])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_escape(table.caption)}" if table.caption else text


def _escape(text: str) -> str:
    """Return the text on one line, such that Markdown shows it as it is."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], text)
