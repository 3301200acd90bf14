"""HTML of the page of `addp app`: images with captions below them, and a style sheet for any width of the window."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

SMALL = 192  # narrower images show their pixels when they are enlarged

CSS = """
.addp h4 { margin: 0.8em 0 0.3em; }
.addp-tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 10px; }
.addp-tiles.wide { grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.addp-tiles.row { display: flex; overflow-x: auto; gap: 6px; }
.addp-tiles.row figure { flex: 1 0 68px; max-width: 128px; }
.addp-tiles figure { margin: 0; min-width: 0; }
.addp-tiles img { width: 100%; max-width: 520px; height: auto; margin: 0; display: block; }
.addp-tiles img.small { image-rendering: pixelated; }
.addp-tiles figcaption { font-size: 0.8em; line-height: 1.25; opacity: 0.8; overflow-wrap: anywhere; }
.addp-legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 6px 0; padding: 0; list-style: none; }
.addp-legend i { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em; }
"""


@dataclass(frozen=True)
class Tile:
    """One picture of the page. content: of a file of this type, image/png or image/svg+xml. width: in pixels."""

    content: bytes
    caption: str = ""
    width: int = SMALL
    type: str = "image/png"


@dataclass(frozen=True)
class Section:
    """Pictures under a title. row: in one row, which scrolls. wide: fewer in a row, for pictures with details."""

    title: str
    tiles: Sequence[Tile] = field(default_factory=list)
    row: bool = False
    wide: bool = False


def tile(image: Image.Image, caption: str = "") -> Tile:
    """Return an image as a tile."""
    with io.BytesIO() as file:
        image.save(file, "png", compress_level=1)
        return Tile(file.getvalue(), caption, image.width)


def render(sections: Sequence[Section], before: str = "") -> str:
    """Return sections as HTML. before: HTML that stands before them."""
    return f'<div class="addp">{before}{"".join(map(_render_section, sections))}</div>'


def _render_section(section: Section) -> str:
    title = f"<h4>{html.escape(section.title)}</h4>" if section.title else ""
    kind = " row" if section.row else " wide" if section.wide else ""
    return f'{title}<div class="addp-tiles{kind}">{"".join(map(_render_tile, section.tiles))}</div>'


def _render_tile(tile: Tile) -> str:
    caption = html.escape(tile.caption)
    small = ' class="small"' if tile.width < SMALL else ""
    source = f"data:{tile.type};base64,{base64.b64encode(tile.content).decode()}"
    return f'<figure><img{small} alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return a legend as HTML. entries: color and text."""
    items = (f'<li><i style="background: {color}"></i>{html.escape(text)}</li>' for color, text in entries)
    return f'<ul class="addp-legend">{"".join(items)}</ul>'
