"""`addp seg predict`: each picture beside its class map, with a legend of the classes found and their shares.

Writes `<out>/<name>.png`, and the bare map to `<out>/maps/<name>.png`: numbered as the annotations (0 is unused, the
first class is 1) and in the legend's colours.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Interval
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from addp_core.errors import UserError
from addp_core.files import replacing
from seg.scenes import SUFFIXES, palette, read_picture
from seg.settings import TestConfig, import_mmseg, load_segmentor
from seg.test import MAPS

log = logging.getLogger("addp")


@dataclass
class Recipe:
    """Keys of `addp seg predict`."""

    model: Annotated[str, "a run of `addp seg train` or its model.safetensors"]
    images: Annotated[str, "a picture or a folder of pictures"]
    out: Annotated[str, "folder for the painted pictures"]
    n: Annotated[int | None, Ge(1), "the first n pictures of the folder; null: all"] = None
    test: TestConfig = field(default_factory=TestConfig)
    paint: Annotated[float, Interval(ge=0, le=1), "opacity of the classes' colours over the picture"] = 0.6
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "arithmetic of the network"] = "fp32"


def run(recipe: Recipe) -> None:
    """Paint the pictures; several processes share them."""
    segmentor, state = load_segmentor(recipe.model)
    root, pictures = find_pictures(recipe)
    import_mmseg()
    from addp_core.engine import process_state
    from seg.launch import Painter

    processes = process_state()
    painter = Painter(segmentor, state, recipe.model, recipe.test, recipe.precision)
    colours, out = palette(len(segmentor.classes)), Path(recipe.out)
    mine = pictures[processes.process_index :: processes.num_processes]
    for path in tqdm(mine, unit="img", disable=not processes.is_main_process):
        name = path.relative_to(root).with_suffix(".png")
        labels = painter(str(path)).numpy()
        sheet = paint(read_picture(path), labels, segmentor.classes, colours, recipe.paint)
        write(sheet, out / name)
        write(numbered(labels, colours), out / MAPS / name)
    processes.wait_for_everyone()
    if processes.is_main_process:
        log.info("seg predict: %d pictures in %s", len(pictures), out)


def find_pictures(recipe: Recipe) -> tuple[Path, list[Path]]:
    """(the folder they lie in, the pictures by name). UserError where there are none."""
    source = Path(recipe.images)
    if source.is_file():
        return source.parent, [source]
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"images: {source}: found no pictures; expected a file or a folder with {', '.join(SUFFIXES)}")
    return source, found[: recipe.n]


def paint(
    picture: Image.Image, labels: np.ndarray, classes: tuple[str, ...], colours: np.ndarray, opacity: float
) -> Image.Image:
    """The picture, the picture under its classes' colours, and the legend, side by side."""
    painted = Image.blend(picture, Image.fromarray(colours[labels]), opacity)
    counts = np.bincount(labels.flatten(), minlength=len(classes))
    present = [i for i in np.argsort(-counts) if counts[i]]
    line, width, height = 14, picture.width, picture.height
    texts = [f"{classes[i]} {100 * counts[i] / labels.size:.1f}%" for i in present]
    font = ImageFont.load_default(11)
    legend = 24 + max(int(font.getlength(text)) for text in texts)
    sheet = Image.new("RGB", (2 * width + legend, max(height, line * len(texts) + 4)), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(painted, (width, 0))
    draw = ImageDraw.Draw(sheet)
    for row, (i, text) in enumerate(zip(present, texts, strict=True)):
        top = 2 + row * line
        draw.rectangle((2 * width + 4, top + 1, 2 * width + 14, top + 11), tuple(map(int, colours[i])))
        draw.text((2 * width + 19, top), text, "black", font)
    return sheet


def numbered(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """The class map as the annotations number it, with the colours as its palette."""
    image = Image.fromarray((labels + 1).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, *colours.flatten().tolist()])
    return image


def write(image: Image.Image, path: Path) -> None:
    """A PNG that is whole or absent. UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            image.save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room and start again") from error
