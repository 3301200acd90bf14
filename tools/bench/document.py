"""Headings, tables, pictures and curves, written as one HTML file that needs nothing else, and as Markdown.

The HTML holds its pictures as data URIs and its style in its head; it has no script and asks no network for anything.
Text is plain: each writer escapes it.
"""

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

PIXELS = 1000  # a picture's longer side in the HTML, at most
SMALL = 240  # pictures narrower than this are enlarged by whole numbers, their pixels kept square


@dataclass(frozen=True)
class Cell:
    """Of a table. note: smaller, below; tone of the note: good, bad or none."""

    text: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """kind: "" measured, "chance", "paper" (published numbers), "sum": how it is set off."""

    cells: Sequence[Cell | str]
    kind: str = ""


@dataclass(frozen=True)
class Heading:
    """level 2 or 3; those of level 2 are in the contents."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. tone: "" or "warn"."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """groups: (name, columns) of a line above the head, as many columns in sum; "" over columns of no group.

    words: the cells hold words, which stand on the left, not figures.
    """

    head: Sequence[str]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()
    caption: str = ""
    words: bool = False


@dataclass(frozen=True)
class Pictures:
    """(file, caption) each; a file that is missing or no picture is said to be."""

    files: Sequence[tuple[Path, str]]


@dataclass(frozen=True)
class Drawings:
    """(SVG, what it shows) each, in the HTML alone."""

    images: Sequence[tuple[bytes, str]]


@dataclass(frozen=True)
class Listing:
    """Text as a terminal shows it, folded away behind its title unless it is `open`."""

    title: str
    text: str
    open: bool = False


Block = Heading | Text | Table | Pictures | Drawings | Listing


# -------------------- HTML

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5c6670; --paper: #fff; --card: #f5f7f9; --line: #d8dee4;
  --accent: #0b62c4; --good: #116b32; --bad: #b3261e; --warn: #fff4d6; --warn-ink: #5c4300; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #9aa5b1; --paper: #14171a; --card: #1d2227;
  --line: #363d45; --accent: #7ab8ff; --good: #6fd08c; --bad: #ff8f86; --warn: #3a3013; --warn-ink: #f3dc9b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .8rem 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 76ch; }
a, summary { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1rem 0; font-size: .9rem; }
.warn { background: var(--warn); color: var(--warn-ink); padding: .6rem .8rem; border-radius: 6px; max-width: none; }
.scroll { width: fit-content; max-width: 100%; overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  margin: .8rem 0; }
.caption, figcaption { color: var(--dim); font-size: .85rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--dim); font-weight: 600; background: var(--card); }
thead .groups th { text-align: left; border-bottom: 0; padding-bottom: 0; color: var(--ink); }
tbody th { font-weight: 600; }
td.text { text-align: left; white-space: normal; min-width: 9rem; max-width: 28rem; }
th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left; white-space: normal;
  min-width: 8.2rem; max-width: min(40vw, 16rem); border-right: 1px solid var(--line); }
thead th:first-child { background: var(--card); }
.words td, .words th { text-align: left; }
td small { display: block; color: var(--dim); line-height: 1.3; }
td .good { color: var(--good); }
td .bad { color: var(--bad); }
.paper > *, .chance > * { color: var(--dim); font-weight: 400; font-style: italic; }
.paper > *, .paper > th:first-child { background: var(--card); }
.paper > th:first-child { white-space: nowrap; }
.sum > * { font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem;
  margin: .8rem 0; }
figure { margin: 0; min-width: 0; }
figure img { max-width: 100%; height: auto; display: block; border-radius: 4px; background: #fff; }
.drawings { display: flex; flex-wrap: wrap; gap: .5rem; margin: .8rem 0; }
.drawings figure { flex: 0 1 430px; }
.drawings img { width: 100%; background: none; }
img.small { image-rendering: pixelated; }
.absent { border: 1px dashed var(--line); border-radius: 4px; padding: 1rem; color: var(--dim); font-size: .85rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-size: .9rem; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem;
  margin: .4rem 0; font: .8rem/1.45 ui-monospace, monospace; overflow-wrap: normal; }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page."""
    headings = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    contents = "".join(f'<a href="#s{i}">{html.escape(text)}</a>' for i, text in enumerate(headings))
    body, section = [], 0
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            body.append(f'<h2 id="s{section}">{html.escape(block.text)}</h2>')
            section += 1
        else:
            body.append(_html(block))
    first = next((i for i, block in enumerate(blocks) if isinstance(block, Heading)), len(blocks))
    body.insert(first, f"<nav>{contents}</nav>")
    name = html.escape(title)
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{name}</h1>",
        *body,
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(lines)


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h3>{html.escape(block.text)}</h3>"
        case Text():
            return f"<p{' class=warn' if block.tone else ''}>{html.escape(block.text)}</p>"
        case Table():
            return _html_table(block)
        case Pictures():
            return f'<div class="pictures">{"".join(_html_picture(*item) for item in block.files)}</div>'
        case Drawings():
            uris = [(f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}", alt) for svg, alt in block.images]
            figures = (f'<figure><img alt="{html.escape(alt)}" src="{uri}"></figure>' for uri, alt in uris)
            return f'<div class="drawings">{"".join(figures)}</div>'
        case Listing():
            opened = " open" if block.open else ""
            summary = f"<summary>{html.escape(block.title)}</summary>"
            return f"<details{opened}>{summary}<pre>{html.escape(block.text)}</pre></details>"


def _html_table(table: Table) -> str:
    lines = [f'<div class="scroll" tabindex="0"><table{" class=words" if table.words else ""}><thead>']
    if table.groups:
        cells = (f'<th colspan="{columns}">{html.escape(name)}</th>' for name, columns in table.groups)
        lines.append(f'<tr class="groups">{"".join(cells)}</tr>')
    lines.append(f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in table.head)}</tr></thead><tbody>")
    for row in table.rows:
        first, *others = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row.cells)
        cells = [f'<th scope="row">{html.escape(first.text)}</th>', *map(_html_cell, others)]
        lines.append(f"<tr{f' class={row.kind}' if row.kind else ''}>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    if table.caption:
        lines.append(f'<p class="caption">{html.escape(table.caption)}</p>')
    return "\n".join(lines)


def _html_cell(cell: Cell) -> str:
    note = f"<small{f' class={cell.tone}' if cell.tone else ''}>{html.escape(cell.note)}</small>" if cell.note else ""
    kind = ' class="text"' if len(cell.text) > 24 else ""
    return f"<td{kind}>{html.escape(cell.text)}{note}</td>"


def _html_picture(path: Path, caption: str) -> str:
    try:
        content, kind, width = _embedded(path)
    except OSError as error:
        reason = error.strerror or "not a picture"
        return f'<figure><div class="absent">{html.escape(f"{path.name}: {reason}")}</div></figure>'
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    size = f' class="small" width="{width * (SMALL // width)}"' if width * 2 <= SMALL else ""
    about = html.escape(caption)
    return f'<figure><img{size} alt="{about}" src="{source}"><figcaption>{about}</figcaption></figure>'


def _embedded(path: Path) -> tuple[bytes, str, int]:
    """(file, png or jpeg, width in pixels) of a picture, scaled down where it is large. OSError: it cannot be read."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((PIXELS, PIXELS))
    candidates = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        with io.BytesIO() as file:
            picture.save(file, kind, **options)
            candidates.append((file.getvalue(), kind))
    png, jpeg = candidates
    # Flat or tiny pictures are smaller, or nearly so, without loss.
    return (*(png if len(png[0]) < 2 * len(jpeg[0]) else jpeg), picture.width)


# -------------------- Markdown


def to_markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The same in Markdown for a file in `folder`: pictures by relative links, drawings by their names."""
    parts = [_markdown(block, folder) for block in (Heading(title, 1), *blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_plain(block.text)}"
        case Text():
            return f"**{_plain(block.text)}**" if block.tone else _plain(block.text)
        case Table():
            return _markdown_table(block)
        case Drawings():
            return f"Drawn in the HTML: {'; '.join(_plain(about) for _, about in block.images)}."
        case Pictures():
            return "\n".join(
                f"![{_plain(caption)}]({quote(os.path.relpath(path, folder))})" if path.is_file() else
                f"({_plain(path.name)} is not there)"
                for path, caption in block.files
            )  # fmt: skip
        case Listing():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", block.text)), default=0))
            return f"{_plain(block.title)}:\n\n{fence}\n{block.text}\n{fence}"
        case _:
            raise TypeError(f"{type(block).__name__} is not written as Markdown")


def _markdown_table(table: Table) -> str:
    names = [name for name, columns in table.groups for _ in range(columns)] or [""] * len(table.head)
    head = [" ".join(filter(None, pair)) for pair in zip(names, table.head, strict=True)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in table.rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row.cells]
        texts = [f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in cells]
        lines.append([f"*{_plain(text)}*" if row.kind == "paper" and text else _plain(text) for text in texts])
    lines[0] = [_plain(name) for name in head]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_plain(table.caption)}" if table.caption else text


def _plain(text: str) -> str:
    """Text of one line that Markdown shows as it is."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], text)
