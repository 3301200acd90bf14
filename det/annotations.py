"""Reads a COCO annotation file and checks every entry.

A file that is not COCO's is a UserError. Single annotations that cannot be used (empty masks, boxes of zero size or
outside their image, unlisted images or categories) are skipped and reported by reason.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from addp_core.base.errors import UserError
from det.config import Category
from det.masks import Segmentation, parse_counts, to_rle

MAX_EXAMPLES = 3  # items listed in a message about many


@dataclass
class CocoAnnotations:
    """The checked content of an annotation file."""

    images: list[dict[str, Any]]  # as in the file; id, file_name, height and width are valid
    categories: tuple[Category, ...]  # sorted by id; an object's label is the position in this tuple
    objects: dict[int, list[dict[str, Any]]]  # image id -> label, bbox, segmentation, area, iscrowd of each object
    skipped: dict[str, list[Any]]  # reason -> ids of the annotations skipped for it
    total: int  # annotations in the file


def read_annotations(path: Path) -> CocoAnnotations:
    """Read and check an annotation file. Raises UserError if it is missing, is not COCO's or lists no image."""
    content = _read_json(path)
    categories = _parse_categories(path, content["categories"])
    images = _check_images(path, content["images"])
    objects, skipped = _parse_objects(content["annotations"], images, categories)
    return CocoAnnotations(images, categories, objects, skipped, len(content["annotations"]))


def first_examples(items: Sequence[Any]) -> str:
    """Return the first few items as text: "a, b, c and 5 more"."""
    more = f" and {len(items) - MAX_EXAMPLES} more" if len(items) > MAX_EXAMPLES else ""
    return ", ".join(map(str, items[:MAX_EXAMPLES])) + more


# -------------------- the file


def _read_json(path: Path) -> dict[str, list]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a COCO annotation file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected a complete COCO annotation file") from error
    if not isinstance(content, dict):
        hint = " (is it a file of detections?)" if isinstance(content, list) else ""
        raise UserError(
            f"{path}: holds a {type(content).__name__}{hint}; expected the JSON object of a COCO annotation file"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{path}: has no list {key!r} of objects; expected images, annotations and categories")
        if key != "annotations" and not content[key]:
            raise UserError(f"{path}: its list {key!r} is empty; expected at least one entry")
    return content


def _parse_categories(path: Path, entries: list[dict[str, Any]]) -> tuple[Category, ...]:
    for entry in entries:
        if not _is_integer(entry.get("id")):
            raise UserError(f"{path}: found a category without an integer id: {_abbreviate(entry)}")
    _check_unique_ids(path, "categories", entries)
    return tuple(sorted((Category(e["id"], str(e.get("name", e["id"]))) for e in entries), key=lambda c: c.id))


def _check_images(path: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries:
        name = entry.get("file_name")
        if not _is_integer(entry.get("id")) or not isinstance(name, str) or not name:
            raise UserError(f"{path}: found an image without id or file_name: {_abbreviate(entry)}")
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(
                f"{path}: image {entry['id']} lies outside the image folder ({name!r}); expected a relative path"
            )
        if not all(_is_integer(entry.get(key)) and entry[key] > 0 for key in ("height", "width")):
            raise UserError(f"{path}: image {entry['id']} ({name}) has no height and width in pixels")
    _check_unique_ids(path, "images", entries)
    return entries


def _check_unique_ids(path: Path, key: str, entries: list[dict[str, Any]]) -> None:
    seen: set[int] = set()
    for entry in entries:
        if entry["id"] in seen:
            raise UserError(f"{path}: two of its {key} have the id {entry['id']}; expected unique ids")
        seen.add(entry["id"])


# -------------------- objects


class _Unusable(Exception):
    """An annotation is skipped; the message names the reason."""


def _parse_objects(
    annotations: list[dict[str, Any]], images: list[dict[str, Any]], categories: Sequence[Category]
) -> tuple[dict[int, list[dict[str, Any]]], dict[str, list[Any]]]:
    """Return (image id -> its objects, reason -> ids of the annotations skipped for it)."""
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
    labels = {category.id: label for label, category in enumerate(categories)}
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    skipped: dict[str, list[Any]] = defaultdict(list)
    for position, annotation in enumerate(annotations):
        try:
            parsed = _parse_object(annotation, sizes, labels)
            objects[annotation["image_id"]].append(parsed)
        except _Unusable as error:
            skipped[str(error)].append(annotation.get("id", f"number {position}"))
    return objects, dict(skipped)


def _parse_object(
    annotation: dict[str, Any], sizes: dict[int, tuple[int, int]], labels: dict[int, int]
) -> dict[str, Any]:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id not in sizes:
        raise _Unusable("of images that are not listed")
    if not isinstance(category_id, int) or isinstance(category_id, bool) or category_id not in labels:
        raise _Unusable("of categories that are not listed")
    box = _clip_box(annotation.get("bbox"), *sizes[image_id])
    segmentation = _check_segmentation(annotation.get("segmentation"), *sizes[image_id])
    area: Any = annotation.get("area")
    if not _is_finite_number(area) or area <= 0:
        area = float(coco_mask.area(to_rle(segmentation, *sizes[image_id])))
        if not area:
            raise _Unusable("with an empty mask")
    crowd = int(bool(annotation.get("iscrowd")))
    return {"label": labels[category_id], "bbox": box, "segmentation": segmentation, "area": area, "iscrowd": crowd}


def _clip_box(box: Any, height: int, width: int) -> list[float]:
    """Return [x, y, width, height] of the part of a box that lies inside the image."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite_number, box)):
        raise _Unusable("without a box of four numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise _Unusable("with a box of zero size")
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if left >= right or top >= bottom:
        raise _Unusable("with a box outside the image")
    return [left, top, right - left, bottom - top]


def _check_segmentation(segmentation: Any, height: int, width: int) -> Segmentation:
    """Return the polygons that have at least three corners, or run lengths that cover the image."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        runs = parse_counts(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(_is_integer(run) and run >= 0 for run in runs):
            raise _Unusable("with a mask that is neither polygons nor run lengths")
        if segmentation.get("size") != [height, width] or sum(runs) != height * width:
            raise _Unusable("with a mask of another size than the image")
        if not sum(runs[1::2]):
            raise _Unusable("with an empty mask")
        return {"size": segmentation["size"], "counts": counts}
    if segmentation is None or segmentation == []:
        raise _Unusable("with an empty mask")
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise _Unusable("with a mask that is neither polygons nor run lengths")
    if not all(_is_finite_number(value) for polygon in segmentation for value in polygon):
        raise _Unusable("with a mask that is neither polygons nor run lengths")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        raise _Unusable("with an empty mask")
    return polygons


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _abbreviate(entry: dict[str, Any]) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 80 else f"{text[:77]}..."
