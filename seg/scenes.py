"""Datasets in ADE20K's layout: pairs of an image and its class map, the classes, and checks of both.

    <root>/images/{training,validation}/*.jpg        <root>/annotations/{training,validation}/*.png
    <root>/objectInfo150.txt or objectInfo.txt       a tab-separated table with the columns Idx and Name

A class map holds 0 or 255 for "other", which is neither learned nor evaluated, and 1, 2, ... for the classes.
"""

import colorsys
import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from addp_core.base.addresses import refuse_address
from addp_core.base.cpu import usable_cores
from addp_core.base.errors import UserError
from addp_core.data.image_source import ImageFiles
from addp_core.data.images import COMMON_EXTENSIONS, ImageError, LazyImage, wrap_image_errors
from addp_core.data.listing import Listing, count_text, list_folder
from seg.recipe import SceneFiles as SceneFiles

log = logging.getLogger("addp")

SPLIT_FOLDERS = {"train": "training", "val": "validation"}
CLASS_TABLES = ("objectInfo150.txt", "objectInfo.txt")
IGNORED = 255  # the label that mmseg neither learns nor evaluates; no class has it, as there are at most 254


@dataclass(frozen=True)
class ScenePair:
    """The paths of an image and its class map."""

    image: Path
    class_map: Path


# -------------------- files


def class_map_folder(root: str | Path, split: str) -> Path:
    """Return the folder of a split's class maps."""
    return Path(root) / "annotations" / SPLIT_FOLDERS[split]


def find_pairs(root: str | Path, split: str, log_dropped: bool = False) -> list[ScenePair]:
    """Return the pairs of a split, sorted by name; each image has the class map of its relative path, with .png.

    log_dropped: log what the folders hold besides pairs. Raises UserError if folders, images or class maps are missing.
    """
    refuse_address(str(root), "data.source")
    images, maps = Path(root) / "images" / SPLIT_FOLDERS[split], class_map_folder(root, split)
    for folder in (images, maps):
        if not folder.is_dir():
            raise UserError(
                f"data.source: {folder} is missing; expected ADE20K's folder with images/{SPLIT_FOLDERS[split]} and "
                f"annotations/{SPLIT_FOLDERS[split]}"
            )
    try:
        image_files, map_files = list_folder(images), list_folder(maps)
    except PermissionError as error:
        raise UserError(f"data.source: no permission to read {error.filename}") from error
    if not image_files.images:
        found = count_text(_dropped(image_files)) or "nothing"
        raise UserError(f"data.source: no images in {images}, found {found}; expected {COMMON_EXTENSIONS}")
    image_paths = sorted(images / name for name in image_files.images)
    class_maps = {Path(name).with_suffix(""): maps / name for name in map_files.images if _is_png(name)}
    stems = [path.relative_to(images).with_suffix("") for path in image_paths]
    if missing := [stem for stem in stems if stem not in class_maps]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        others = [name for name in map_files.images if Path(name).with_suffix("") == missing[0]]
        found = f" (found {others[0]}, which is no .png)" if others else ""
        raise UserError(
            f"data.source: {maps / missing[0]}.png is missing{more}{found}; expected a class map for each image"
        )
    if log_dropped:
        _log_dropped(images, image_files)
        _log_dropped(maps, map_files)
        _warn_of_unequal_numbers(stems, class_maps)
    return [ScenePair(path, class_maps[stem]) for path, stem in zip(image_paths, stems, strict=True)]


class SceneListing:
    """The pairs of a split, as a run folder records them."""

    def __init__(self, root: str | Path, split: str):
        """Find the pairs. Raises UserError like `find_pairs`."""
        self.pairs = find_pairs(root, split)
        self.class_maps = ClassMaps([pair.class_map for pair in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def digest(self) -> str:
        """Return a digest of the listing, which does not depend on where the dataset lies."""
        root = Path(self.pairs[0].image.anchor)
        files = [[str(pair.image) for pair in self.pairs], [str(pair.class_map) for pair in self.pairs]]
        return "-".join(ImageFiles(root, names).digest() for names in files)


class ClassMaps:
    """The content of the class maps of a split, as a run folder records it: labels are corrected, and a file may then
    have as many bytes as before, which is all that a listing tells of it.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """Return a digest of all files. Raises UserError if one cannot be read."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        with ThreadPoolExecutor(usable_cores()) as pool:
            digests = tqdm(pool.map(_file_digest, self.paths), "class maps", len(self), leave=False, disable=None)
            return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def recorded_datasets(listings: Mapping[str, SceneListing]) -> dict[str, SceneListing | ClassMaps]:
    """Return what a run folder records of the splits. Class maps have entries of their own, which runs from before them
    lack: in these, only the listings are compared.
    """
    return {**listings, **{f"class maps of {split}": listing.class_maps for split, listing in listings.items()}}


def _file_digest(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _is_png(name: str) -> bool:
    return name.lower().endswith(".png")


def _dropped(listing: Listing) -> Counter[str]:
    return listing.passed_over + listing.others + Counter({".tar": len(listing.tars)})


def _log_dropped(folder: Path, listing: Listing) -> None:
    if dropped := _dropped(listing):
        log.info("data: %s: passed over: %s", folder, count_text(dropped))


def _warn_of_unequal_numbers(stems: list[Path], class_maps: dict[Path, Path]) -> None:
    """Warn about class maps that no image, or more than one, belongs to."""
    images_by_stem = Counter(stems)
    if unused := [path for stem, path in sorted(class_maps.items()) if stem not in images_by_stem]:
        log.warning("data: %d class maps have no image and are not used: %s", len(unused), _first_names(unused))
    if shared := [class_maps[stem] for stem, count in sorted(images_by_stem.items()) if count > 1]:
        log.warning(
            "data: %d class maps belong to several images, which differ in their extension: %s",
            len(shared),
            _first_names(shared),
        )


def _first_names(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def read_class_names(root: str | Path, table: str = "") -> tuple[str, ...]:
    """Return the names of the classes in order, each the first of its synonyms.

    Args:
        root: the dataset's folder.
        table: the file with the columns Idx and Name; by default the one in the dataset's folder.

    Raises:
        UserError: if the table is missing, unreadable or not of this form.
    """
    paths = [Path(table)] if table else [path for name in CLASS_TABLES if (path := Path(root) / name).is_file()]
    if not paths:
        raise UserError(
            f"data.classes: neither {' nor '.join(CLASS_TABLES)} in {root}; expected one, or data.classes=<table>"
        )
    path = paths[0]
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t"))
        numbered = [(int(row["Idx"]), row["Name"].split(",")[0].split(";")[0].strip()) for row in rows]
    except OSError as error:
        raise UserError(f"data.classes: {path} cannot be read ({error.strerror})") from error
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"data.classes: {path}: expected a tab-separated table with the columns Idx and Name"
        ) from error
    names = dict(numbered)
    number, times = Counter(number for number, _ in numbered).most_common(1)[0] if numbered else (0, 0)
    if times > 1:
        same = ", ".join(repr(name) for each, name in numbered if each == number)
        raise UserError(f"data.classes: {path}: found Idx {number} {times} times ({same}), expected each number once")
    if sorted(names) != list(range(1, len(names) + 1)) or not 1 <= len(names) < IGNORED:
        raise UserError(f"data.classes: {path}: expected Idx 1, 2, ... without gaps, at most {IGNORED - 1}")
    return tuple(names[i] for i in range(1, len(names) + 1))


# -------------------- images and class maps


def read_image(path: str | Path) -> Image.Image:
    """Read an image as upright RGB. Raises UserError if it cannot be read."""
    try:
        return LazyImage(Path(path).read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise UserError(f"{path}: {error}") from error


def read_class_map(path: str | Path, size: tuple[int, int] | None, classes: int) -> np.ndarray:
    """Read a class map as UInt8[H,W]: 0, 1, ... for the classes and `IGNORED` for "other". See `read_labels`."""
    labels = read_labels(path, size, classes)
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1).astype(np.uint8)


def read_labels(path: str | Path, size: tuple[int, int] | None, classes: int) -> np.ndarray:
    """Read a class map as Int[H,W], with the labels that it holds: 1, 2, ... for the classes, 0 and 255 for "other".

    Args:
        path: the file.
        size: (height, width) of its image, to be checked; None not to check it.
        classes: number of classes.

    Raises:
        UserError: if the file cannot be read, has another size or several channels, or holds a label that is not a
            class.
    """
    try:
        with wrap_image_errors(), Image.open(path) as image:
            labels = np.array(image).astype(np.int32)
    except ImageError as error:
        raise UserError(f"{path}: {error}") from error
    if labels.ndim != 2:
        raise UserError(f"{path}: found {labels.shape[2]} channels, expected one that holds the number of the class")
    if size is not None and labels.shape != tuple(size):
        (map_height, map_width), (height, width) = labels.shape, size
        exif = "; an EXIF orientation turns the image but not its class map: turn the class map"
        raise UserError(
            f"{path}: found {map_width} x {map_height} pixels, expected its image's {width} x {height}"
            f"{exif if labels.shape == (width, height) else ''}"
        )
    smallest, largest = int(labels.min(initial=0)), int(labels[labels != IGNORED].max(initial=0))
    if smallest < 0 or largest > classes:
        raise UserError(
            f"{path}: found label {min(smallest, 0) or largest}, expected 0 (other) to {classes}, or 255 (other); for "
            "more classes, set data.classes"
        )
    return labels


def to_class_map(labels: np.ndarray, colors: np.ndarray) -> Image.Image:
    """Convert Int[H,W], with classes from 0, into a class map as ADE20K stores it, with `colors` as its palette."""
    image = Image.fromarray((labels + 1).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, *colors.flatten().tolist()])
    return image


def class_colors(classes: int) -> np.ndarray:
    """Return UInt8[classes,3], the same for every call, with clearly different colors for neighboring classes."""
    golden_ratio = 0.618034
    colors = [
        colorsys.hsv_to_rgb(i * golden_ratio % 1, 0.9 - 0.4 * (i % 3) / 2, 1 - 0.35 * (i % 2)) for i in range(classes)
    ]
    return (np.array(colors).reshape(-1, 3) * 255).astype(np.uint8)


# -------------------- checks before training and evaluation


def check_scenes(data: SceneFiles, classes: tuple[str, ...]) -> None:
    """Raise UserError if the pairs of a split cannot be used, or if there is nothing to learn from them.

    All pairs of the validation split are read: the evaluation would otherwise find out when the training is done.
    """
    labels = check_pairs(find_pairs(data.source, "train", log_dropped=True), classes, data.check, min_classes=2)
    validation = find_pairs(data.source, "val", log_dropped=True)
    labels |= check_pairs(validation, classes, len(validation))
    check_numbering(labels, classes)


def check_pairs(pairs: list[ScenePair], class_names: Sequence[str], limit: int, min_classes: int = 1) -> set[int]:
    """Read up to `limit` of the pairs, evenly spaced, and more of them until `min_classes` classes have been found.

    Returns the labels found. Raises UserError for the first pair that cannot be used, or if there are fewer classes.
    """
    folder = pairs[0].class_map.parent
    numbering = "background 1 and foreground 2, for instance, with a row for each in data.classes"
    if len(class_names) < min_classes:
        raise UserError(
            f"data.classes: found one class, {class_names[0]!r}, and nothing to tell it from, because label 0 (other) "
            f"is not learned; expected two classes or more: {numbering}"
        )
    evenly_spaced = np.linspace(0, len(pairs) - 1, min(limit, len(pairs))).astype(int)
    checked = np.unique(evenly_spaced).tolist()
    log.info("data: %s: reading %d of %d class maps and their images to check them", folder, len(checked), len(pairs))
    labels: set[int] = set()
    with ThreadPoolExecutor(usable_cores()) as pool:
        read = pool.map(partial(_labels_of_pair, classes=len(class_names)), [pairs[i] for i in checked])
        for found in tqdm(read, "check", len(checked), leave=False, unit="img", disable=None):
            labels |= found
    for i in sorted(set(range(len(pairs))) - set(checked)):
        if len(labels - {0, IGNORED}) >= min_classes:
            break
        labels |= _labels_of_pair(pairs[i], len(class_names))
    if len(labels - {0, IGNORED}) < min_classes:
        found = ", ".join(str(label) for label in sorted(labels))
        needed = "two classes to tell apart" if min_classes > 1 else "a class"
        raise UserError(
            f"data.source: {folder}: the class maps hold no label but {found}, and 0 and 255 (other) are neither "
            f"learned nor evaluated; expected {needed}, numbered from 1: {numbering}"
        )
    return labels


def _labels_of_pair(pair: ScenePair, classes: int) -> set[int]:
    """Return the labels in the class map. Raises UserError if the image or the class map cannot be used."""
    image = read_image(pair.image)  # the pixels too, for a header says nothing about the rest of a file
    labels = read_labels(pair.class_map, (image.height, image.width), classes)
    return set(np.flatnonzero(np.bincount(labels.flatten())).tolist())


def check_numbering(labels: set[int], class_names: Sequence[str]) -> None:
    """Warn if the labels may be numbered from 0; raises UserError if 0 beside 255 makes this almost certain."""
    last = len(class_names)
    if last in labels:
        return
    if {0, IGNORED} <= labels:
        raise UserError(
            f"data.source: the class maps hold 0 and 255 but never {last} ({class_names[-1]}): numbers from 0, with "
            "255 for other? 0 means other too; expected classes from 1: add 1 to all labels except 255, or, if 0 does "
            "mean other, write 0 for 255"
        )
    log.warning(
        "data: none of the class maps that were read has the last label, %d (%s): if your labels begin at 0, which is "
        "not learned, add 1 to all of them",
        last,
        class_names[-1],
    )


def dataset_meta(classes: Sequence[str]) -> dict[str, Any]:
    """Return what mmseg's checkpoints say about classes."""
    palette = class_colors(len(classes)).tolist()
    return {"classes": list(classes), "palette": palette, "reduce_zero_label": True}
