"""The objects of a COCO annotation file, each checked against its image.

An annotation that cannot be used is skipped and counted by reason. What is written differently from COCO and has only
one meaning (ids as text, a polygon as one flat list, a missing box beside a mask) is read and counted too.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from addp_core.data.images import MAX_PIXELS
from det.config import Category
from det.masks import Extent, Segmentation, box_iou, clip_far_polygons, mask_area, mask_extent, parse_counts

EMPTY_MASK = "with an empty mask"
OTHER_MASK = "with a mask that is neither polygons nor run lengths"
OTHER_SIZE = "with a mask of another size than the image"
FRACTIONS = "with coordinates from 0 to 1, as if in fractions of the image; expected pixels"
OUTSIDE = "with a mask outside the image"
MASK_PROBLEMS = frozenset({EMPTY_MASK, OTHER_MASK, OTHER_SIZE, OUTSIDE})  # the box beside such a mask can be used
CORNERS = "[left, top, right, bottom], while COCO's boxes are [x, y, width, height]"
NOT_CROWD = frozenset({"", "0", "0.0", "false", "no", "none", "null"})
MIN_IOU = 0.5  # of a box and the extent of its mask; below it they disagree
MAX_EXCESS = 2.0  # pixels by which a box may differ from its mask, or reach past its image, without a warning

Notes = dict[str, list[Any]]  # what is noted -> ids of the annotations


@dataclass
class ParsedObjects:
    """The objects of an annotation file, and what happened to its annotations."""

    by_image: dict[int, list[dict[str, Any]]]  # image id -> label, bbox, segmentation or None, area, iscrowd
    masks: bool = True  # whether every object has a mask; otherwise none has
    skipped: Notes = field(default_factory=dict)  # reason -> annotations that cannot be used
    repaired: Notes = field(default_factory=dict)  # how they were read -> annotations written differently from COCO
    doubtful: Notes = field(default_factory=dict)  # why -> annotations that are used although they are probably wrong


def parse_id(value: Any) -> int | None:
    """Return an id as a whole number: 7, 7.0 and "7" are the same id. None if it is none of these."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,18}(\.0*)?\s*", value):
        return int(float(value)) if "." in value else int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def parse_objects(
    annotations: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
    categories: Sequence[Category],
    masks: Literal["auto"] | bool,
) -> ParsedObjects:
    """Check all annotations.

    Args:
        annotations: the entries of the file.
        sizes: image id -> (height, width).
        categories: an object's label is the position in them.
        masks: whether objects need masks; "auto": unless the file has none, apart from those of crowds.
    """
    parser = _Parser(sizes, {category.id: label for label, category in enumerate(categories)})
    for position, annotation in enumerate(annotations):
        parser.add(annotation, annotation.get("id", f"number {position}"))
    if masks == "auto":
        masks = not parser.entries or any(
            entry.problem != EMPTY_MASK for entry in parser.entries if not entry.obj["iscrowd"]
        )
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in parser.entries:
        if masks and entry.problem:
            parser.skipped[entry.problem].append(entry.id)
            continue
        if not masks:
            entry.obj["segmentation"] = None
        by_image[entry.image_id].append(entry.obj)
    return ParsedObjects(by_image, masks, dict(parser.skipped), dict(parser.repaired), parser.doubtful())


class _Unusable(Exception):
    """An annotation is skipped; the message names the reason."""


class _NoMask(Exception):
    """An annotation has no usable mask; the message names the reason."""


@dataclass
class _Entry:
    id: Any
    image_id: int
    obj: dict[str, Any]
    problem: str  # why it has no mask; empty if it has one


class _Parser:
    """Reads annotations one by one."""

    def __init__(self, sizes: dict[int, tuple[int, int]], labels: dict[int, int]):
        self.sizes, self.labels = sizes, labels
        self.entries: list[_Entry] = []
        self.skipped: Notes = defaultdict(list)
        self.repaired: Notes = defaultdict(list)
        self.as_corners: list[Any] = []  # boxes that fit their mask only if read as left, top, right, bottom
        self.different: list[Any] = []  # boxes that fit it in neither reading
        self.beyond: list[Any] = []  # boxes without a mask that reach past the image, and would not as corners
        self.maybe_corners = True  # whether all boxes without a mask could be corners
        self.unmasked = 0

    def add(self, annotation: dict[str, Any], id_: Any) -> None:
        """Read an annotation, or note why it cannot be used."""
        try:
            self.entries.append(self._parse(annotation, id_))
        except _Unusable as error:
            self.skipped[str(error)].append(id_)

    def doubtful(self) -> Notes:
        """Return what is probably wrong with boxes."""
        notes: Notes = {}
        if self.as_corners:
            notes[f"with a box that fits its mask only as {CORNERS}"] = self.as_corners
        if self.different:
            notes["with a box that does not fit its mask"] = self.different
        if self.maybe_corners and len(self.beyond) > 0.1 * self.unmasked:
            notes[f"with a box that reaches past its image, but not if read as {CORNERS}"] = self.beyond
        return notes

    def _parse(self, annotation: dict[str, Any], id_: Any) -> _Entry:
        image_id, category_id = (self._read_id(annotation, key, id_) for key in ("image_id", "category_id"))
        if image_id not in self.sizes:
            raise _Unusable("of images that are not listed")
        if category_id not in self.labels:
            raise _Unusable("of categories that are not listed")
        height, width = self.sizes[image_id]
        if height * width > MAX_PIXELS:
            raise _Unusable(f"of images of more than {MAX_PIXELS} pixels")
        segmentation, problem = None, ""
        try:
            segmentation = self._read_segmentation(annotation.get("segmentation"), height, width, id_)
        except _NoMask as error:
            problem = str(error)
        box = annotation.get("bbox")
        if box is None and segmentation is None:
            raise _Unusable("without a box and without a mask")
        if box is None and segmentation is not None:
            left, top, right, bottom = mask_extent(segmentation)
            box = [left, top, right - left, bottom - top]
            self.repaired["without a box, which was taken from the mask"].append(id_)
        else:
            self._compare(box, segmentation, height, width, id_)
        clipped = _clip_box(box, height, width)
        area: Any = annotation.get("area")
        if not _is_finite_number(area) or area <= 0:
            area = mask_area(segmentation, height, width) if segmentation else clipped[2] * clipped[3]
            if not area:
                segmentation, problem, area = None, EMPTY_MASK, clipped[2] * clipped[3]
        obj = {"label": self.labels[category_id], "bbox": clipped, "segmentation": segmentation, "area": area}
        return _Entry(id_, image_id, obj | {"iscrowd": int(_is_crowd(annotation.get("iscrowd")))}, problem)

    def _read_id(self, annotation: dict[str, Any], key: str, id_: Any) -> Any:
        value = annotation.get(key)
        parsed = parse_id(value)
        if parsed is not None and type(value) is not int:
            self.repaired[f"with {key} as {'text' if isinstance(value, str) else 'a decimal number'}"].append(id_)
        return parsed

    def _read_segmentation(self, segmentation: Any, height: int, width: int, id_: Any) -> Segmentation:
        """Return polygons of at least three corners, or run lengths that cover the image. Raises _NoMask."""
        if isinstance(segmentation, dict):
            return _check_run_lengths(segmentation, height, width)
        if not segmentation and segmentation != 0:
            raise _NoMask(EMPTY_MASK)
        polygons, written = _as_polygons(segmentation)
        if written:
            self.repaired[written].append(id_)
        usable = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not usable:
            raise _NoMask(EMPTY_MASK)
        if len(usable) < len(polygons):
            self.repaired["whose polygons of fewer than three corners were left out"].append(id_)
        if _is_fraction(mask_extent(usable), [value for polygon in usable for value in polygon], height, width):
            raise _NoMask(FRACTIONS)
        clipped = clip_far_polygons(usable, height, width)
        if clipped is not usable:
            self.repaired["with corners far outside the image, where the polygon was clipped"].append(id_)
        if not clipped:
            raise _NoMask(OUTSIDE)
        return clipped

    def _compare(self, box: Any, segmentation: Segmentation | None, height: int, width: int, id_: Any) -> None:
        """Note a box that differs from its mask, or that reaches past its image."""
        if not _is_box(box):
            return
        x, y, w, h = box
        if segmentation is None:
            self.unmasked += 1
            self.maybe_corners &= 0 <= x < w <= width + MAX_EXCESS and 0 <= y < h <= height + MAX_EXCESS
            if x + w > width + MAX_EXCESS or y + h > height + MAX_EXCESS:
                self.beyond.append(id_)
            return
        extent = mask_extent(segmentation)
        difference = max(abs(a - b) for a, b in zip(extent, (x, y, x + w, y + h), strict=True))
        if difference > MAX_EXCESS and box_iou(extent, (x, y, x + w, y + h)) < MIN_IOU:
            (self.as_corners if box_iou(extent, (x, y, w, h)) >= MIN_IOU else self.different).append(id_)


def _clip_box(box: Any, height: int, width: int) -> list[float]:
    """Return [x, y, width, height] of the part of a box that lies inside the image."""
    if not _is_box(box):
        raise _Unusable("without a box of four numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise _Unusable("with a box of zero size")
    if _is_fraction((x, y, x + w, y + h), box, height, width):
        raise _Unusable(FRACTIONS)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if left >= right or top >= bottom:
        raise _Unusable("with a box outside the image")
    return [left, top, right - left, bottom - top]


def _check_run_lengths(segmentation: dict[str, Any], height: int, width: int) -> Segmentation:
    """Return run lengths if they cover the image. Raises _NoMask."""
    counts = segmentation.get("counts")
    runs = parse_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise _NoMask(OTHER_MASK)
    if segmentation.get("size") != [height, width] or sum(runs) != height * width:
        raise _NoMask(OTHER_SIZE)
    if not sum(runs[1::2]):
        raise _NoMask(EMPTY_MASK)
    return {"size": [height, width], "counts": counts}


def _as_polygons(segmentation: Any) -> tuple[list[list[float]], str]:
    """Return the polygons, and how they were written if not as COCO does: [[x, y, x, y, ...], ...].

    Raises _NoMask if there are no polygons of numbers.
    """
    written = ""
    if not isinstance(segmentation, list):
        raise _NoMask(OTHER_MASK)
    if all(map(_is_finite_number, segmentation)):
        segmentation, written = [segmentation], "whose polygon is one flat list of numbers"
    elif len(segmentation) > 2 and all(map(_is_point, segmentation)):
        segmentation = [[value for point in segmentation for value in point]]
        written = "whose polygon is a list of points [x, y]"
    elif all(isinstance(polygon, list) and polygon and all(map(_is_point, polygon)) for polygon in segmentation):
        segmentation = [[value for point in polygon for value in point] for polygon in segmentation]
        written = "whose polygons are lists of points [x, y]"
    if not all(isinstance(polygon, list) and all(map(_is_finite_number, polygon)) for polygon in segmentation):
        raise _NoMask(OTHER_MASK)
    return segmentation, written


def _is_fraction(extent: Extent, values: Sequence[float], height: int, width: int) -> bool:
    """Check whether coordinates look like fractions of the image: all in [0, 1], and not all whole numbers."""
    inside = min(extent) >= 0 and max(extent) <= 1
    return inside and max(height, width) > 1 and any(value % 1 for value in values)


def _is_crowd(value: Any) -> bool:
    return value.strip().lower() not in NOT_CROWD if isinstance(value, str) else bool(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_finite_number, value))


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_finite_number, value))


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
