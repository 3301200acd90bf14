"""`addp seg predict`: each picture beside its class map, with a legend of the classes found and their shares.

Writes `<out>/<name>.png`, and the bare map to `<out>/maps/<name>.png`: numbered as the annotations (0 is unused, the
first class is 1) and in the legend's colours. Where pictures share a name, each keeps its extension: `<name>.jpg.png`.
"""

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from accelerate.utils import gather_object
from annotated_types import Ge, Interval
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from addp_core.base.errors import UserError, renaming_keys
from addp_core.data.images import ImageError, write_png
from addp_core.data.sources import ImageFiles, ImageSource, open_source
from addp_core.training.engine import process_state
from seg.scenes import numbered, palette
from seg.settings import TestConfig, import_mmseg, load_segmentor
from seg.test import MAPS

log = logging.getLogger("addp")


@dataclass
class Recipe:
    """Keys of `addp seg predict`."""

    model: Annotated[str, "a run of `addp seg train` or its model.safetensors"]
    images: Annotated[str, "a picture or a folder of pictures, flat or nested"]
    out: Annotated[str, "folder for the painted pictures"]
    n: Annotated[int | None, Ge(1), "the first n pictures of the folder; null: all"] = None
    test: TestConfig = field(default_factory=TestConfig)
    paint: Annotated[float, Interval(ge=0, le=1), "opacity of the classes' colours over the picture"] = 0.6
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "arithmetic of the network"] = "fp32"


def run(recipe: Recipe) -> None:
    """Paint the pictures; several processes share them. Those that cannot be read are named and passed over."""
    segmentor, state = load_segmentor(recipe.model)
    root, source = open_pictures(recipe.images)
    names = file_names(root, source)[: recipe.n]
    import_mmseg()
    from seg.launch import Painter

    processes = process_state()
    painter = Painter(segmentor, state, recipe.model, recipe.test, recipe.precision)
    colours, out, unreadable = palette(len(segmentor.classes)), Path(recipe.out), []
    mine = range(processes.process_index, len(names), processes.num_processes)
    for index in tqdm(mine, unit="img", disable=not processes.is_main_process):
        try:
            picture = source.open_image(index)[0].decode()
        except ImageError as error:
            log.warning("%s: %s; passed over", source.name(index), error)
            unreadable.append(index)
            continue
        labels = painter(picture).numpy()
        write_png(paint(picture, labels, segmentor.classes, colours, recipe.paint), out / names[index])
        write_png(numbered(labels, colours), out / MAPS / names[index])
    unreadable = gather_object(unreadable)
    if len(unreadable) == len(names):
        raise UserError(f"images: none of the {len(names)} pictures in {recipe.images} can be read")
    if processes.is_main_process:
        log.info("seg predict: %d pictures in %s, %d unreadable", len(names) - len(unreadable), out, len(unreadable))


def open_pictures(images: str) -> tuple[Path, ImageSource]:
    """(the folder they lie in, the pictures by name). UserError where there are none."""
    path = Path(images).expanduser()
    if path.is_file() and path.suffix.lower() != ".tar":
        return path.parent, ImageFiles(path.parent, [path.name])
    with renaming_keys({"data.source": "images", "data.split": "images"}):
        return path, open_source(images)


def file_names(root: Path, source: ImageSource) -> list[Path]:
    """What each picture's map is called, relative to `out`: no two the same."""
    pictures = [Path(os.path.relpath(source.name(index), root)) for index in range(len(source))]
    shared = Counter(path.with_suffix("") for path in pictures)
    return [
        path.with_suffix(".png") if shared[path.with_suffix("")] == 1 else path.with_name(f"{path.name}.png")
        for path in pictures
    ]


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
