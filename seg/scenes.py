"""Scenes with class maps in ADE20K's layout: which files belong together, what the classes are called, what is wrong.

    <root>/images/{training,validation}/*.jpg        <root>/annotations/{training,validation}/*.png
    <root>/objectInfo150.txt or objectInfo.txt       a table with the columns Idx and Name

A class map holds 0 for "other", which is neither learned nor counted, and 1, 2, ... for the classes.
"""

import colorsys
import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from PIL import Image

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError, LazyImage, wrap_image_errors

log = logging.getLogger("addp")

FOLDERS = {"train": "training", "val": "validation"}
TABLES = ("objectInfo150.txt", "objectInfo.txt")
SUFFIXES = (".jpg", ".jpeg", ".png")
IGNORED = 255  # what mmseg does not count


@dataclass
class SceneConfig:
    """Where the scenes lie and how they are cut."""

    __shorthand__ = "source"

    source: Annotated[str, "ADE20K's folder (ADEChallengeData2016): images/ and annotations/ with training, validation"]
    classes: Annotated[str, "table of the classes; by default objectInfo150.txt or objectInfo.txt in the folder"] = ""
    crop: Annotated[int | None, Ge(16), "pixels of a side of the crops; null: the config's"] = None
    scale: Annotated[
        tuple[int, int] | None,
        "shorter and longest side of resized images, times a factor of 0.5 to 2 in training; null: the config's",
    ] = None
    workers: Annotated[int | None, Ge(0), "loading processes; by default one on a CPU, else as many as cores"] = None
    check: Annotated[
        int, Ge(0), "pairs of each split whose sizes and labels are read before training starts, spread evenly"
    ] = 1000


@dataclass(frozen=True)
class Pair:
    """A picture and its class map."""

    picture: Path
    classes: Path


def maps_of(root: str | Path, split: str) -> Path:
    """The folder of a split's class maps."""
    return Path(root) / "annotations" / FOLDERS[split]


def find_pairs(root: str | Path, split: str) -> list[Pair]:
    """The pairs of a split, by name. UserError where folders or class maps are missing."""
    images, maps = Path(root) / "images" / FOLDERS[split], maps_of(root, split)
    for folder in (images, maps):
        if not folder.is_dir():
            raise UserError(
                f"data.source: {folder} is missing; expected ADE20K's folder with images/{FOLDERS[split]} and "
                f"annotations/{FOLDERS[split]}"
            )
    pictures = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise UserError(f"data.source: no pictures in {images}; expected {', '.join(SUFFIXES)}")
    known = {path.relative_to(maps) for path in maps.rglob("*.png")}
    pairs = [path.relative_to(images).with_suffix(".png") for path in pictures]
    if missing := [name for name in pairs if name not in known]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"data.source: {maps / missing[0]} is missing{more}; expected a class map for each picture")
    return [Pair(picture, maps / name) for picture, name in zip(pictures, pairs, strict=True)]


def class_names(root: str | Path, table: str = "") -> tuple[str, ...]:
    """The classes in order, each by its first name. UserError where there is no table or it is not one."""
    found = [Path(table)] if table else [path for name in TABLES if (path := Path(root) / name).is_file()]
    if not found:
        raise UserError(
            f"data.classes: neither {' nor '.join(TABLES)} in {root}; expected one, or data.classes=<table>"
        )
    try:
        rows = list(csv.DictReader(found[0].read_text(encoding="utf-8").splitlines(), delimiter="\t"))
        names = {int(row["Idx"]): row["Name"].split(",")[0].split(";")[0].strip() for row in rows}
    except OSError as error:
        raise UserError(f"data.classes: {found[0]} cannot be read ({error.strerror})") from error
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"data.classes: {found[0]}: expected a table with tabs and the columns Idx and Name") from error
    if sorted(names) != list(range(1, len(names) + 1)) or not 1 <= len(names) < IGNORED:
        raise UserError(f"data.classes: {found[0]}: expected Idx 1, 2, ... without gaps, {IGNORED - 1} at most")
    return tuple(names[i] for i in range(1, len(names) + 1))


def palette(classes: int) -> np.ndarray:
    """UInt8[classes,3], colours that differ most between neighbours; always the same."""
    golden = 0.618034
    hues = [colorsys.hsv_to_rgb(i * golden % 1, 0.9 - 0.4 * (i % 3) / 2, 1 - 0.35 * (i % 2)) for i in range(classes)]
    return np.uint8(np.array(hues).reshape(-1, 3) * 255)


def read_picture(path: str | Path) -> Image.Image:
    """The picture as upright RGB. UserError where it cannot be read."""
    try:
        return LazyImage(Path(path).read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise UserError(f"{path}: {error}") from error


def read_class_map(path: str | Path, size: tuple[int, int] | None, classes: int) -> np.ndarray:
    """UInt8[H,W]: 0 and up for the classes, `IGNORED` for other. size: (height, width) of the picture.

    UserError where it cannot be read, has another size or more than one channel, or holds a label beyond the classes.
    """
    try:
        with wrap_image_errors(), Image.open(path) as image:
            labels = np.array(image).astype(np.int32)
    except ImageError as error:
        raise UserError(f"{path}: {error}") from error
    if labels.ndim != 2:
        raise UserError(f"{path}: found {labels.shape[2]} channels, expected one that holds the number of the class")
    if size is not None and labels.shape != tuple(size):
        (h, w), (height, width) = labels.shape, size
        raise UserError(f"{path}: found {w} x {h} pixels, expected its picture's {width} x {height}")
    if (most := int(labels.max(initial=0))) > classes:
        raise UserError(f"{path}: found label {most}, expected 0 (other) to {classes}; more classes? give data.classes")
    return np.where(labels == 0, IGNORED, labels - 1).astype(np.uint8)


def numbered(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Int[H,W] from 0 -> the class map as the annotations number it, with the colours as its palette."""
    image = Image.fromarray((labels + 1).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, *colours.flatten().tolist()])
    return image


def check_pairs(pairs: list[Pair], classes: int, most: int) -> None:
    """Reads at most `most` of the pairs, spread evenly; UserError on the first that training could not use."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(most, len(pairs))).astype(int)) if most else []
    if len(chosen) < len(pairs):
        log.info("reading %d of %d pairs to check them (data.check)", len(chosen), len(pairs))
    for i in chosen:
        try:
            with wrap_image_errors():
                picture = LazyImage(pairs[i].picture.read_bytes())
        except ImageError as error:
            raise UserError(f"{pairs[i].picture}: {error}") from error
        read_class_map(pairs[i].classes, (picture.height, picture.width), classes)
