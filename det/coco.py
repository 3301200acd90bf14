"""COCO's files: reading them with every check, and average precision by its own evaluation (pycocotools).

What cannot be used is left out, counted and named in one line: empty masks, boxes of zero size or outside their image,
annotations of images or categories that are not listed. Crowds are not trained on; evaluation handles them as COCO's
does.
"""

import contextlib
import io
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.images import ImageError, LazyImage, wrap_image_errors
from addp_core.data.sources import ImageSource
from addp_core.data.stream import error_limit
from det.config import Category, CocoFiles

log = logging.getLogger("addp")

SHOWN = 3  # examples in a message about many
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval's stats
RECALL = 8  # place of the recall with 100 detections in them


class ScenePicture(LazyImage):
    """A picture and what is to be seen on it: `objects` as `CocoSet.objects` gives them."""

    def __init__(self, encoded: bytes, objects: list[dict[str, Any]]):
        super().__init__(encoded)
        self.objects = objects


class CocoSet(ImageSource):
    """Images of a COCO file with their objects.

    `categories` are sorted by id; a label counts them from 0. `sizes[i]` is (height, width), `ids[i]` the image's id.
    UserError: a file that is missing, is not JSON or not COCO's, has no image or category, or lacks more image files
    than `max_errors` allows.
    """

    def __init__(self, annotations: Path, images: Path, max_errors: float = 0.0, empty: bool = True):
        """empty: keep images without objects (crowds do not count)."""
        self.path, self.folder = annotations, images
        content = _read(annotations)
        self.categories = _categories(annotations, content["categories"])
        self.classes = tuple(category.name for category in self.categories)
        entries = _entries(annotations, content["images"])
        objects, left_out = _objects(annotations, content["annotations"], entries, self.categories)
        self.left_out = left_out
        """Why annotations were left out -> their ids."""
        if left_out:
            found = "; ".join(f"{len(ids)} {why} ({_some(ids)})" for why, ids in left_out.items())
            total = sum(map(len, left_out.values()))
            log.warning(
                "data: %s: %d of %d annotations left out: %s", annotations, total, len(content["annotations"]), found
            )
        present = _existing(images, [entry["file_name"] for entry in entries])
        self.missing = [entry["file_name"] for entry in entries if entry["file_name"] not in present]
        self._tolerate(len(entries), max_errors)
        kept = [entry for entry in entries if empty or any(not o["iscrowd"] for o in objects[entry["id"]])]
        if not kept:
            raise UserError(f"{annotations}: no image has an object; expected some, or data.empty=true")
        self.ids = [entry["id"] for entry in kept]
        self.sizes = [(entry["height"], entry["width"]) for entry in kept]
        self._names = [entry["file_name"] for entry in kept]
        # of lists and dicts, forked workers copy page after page by counting references; of bytes they do not
        self._objects = [json.dumps(objects[entry["id"]]).encode() for entry in kept]
        log.info("data: %s: %s images, %d categories", annotations, f"{len(self):,}", len(self.categories))

    def _tolerate(self, total: int, max_errors: float) -> None:
        if not self.missing:
            return
        limit = error_limit(max_errors, total)
        found = f"{len(self.missing)} of {total} image files are missing in {self.folder} ({_some(self.missing)})"
        if len(self.missing) > limit:
            raise UserError(
                f"{self.path}: {found}, {limit} tolerated; expected the images of these annotations: "
                "give their folder, or raise data.max_errors"
            )
        log.warning("data: %s, %d tolerated", found, limit)

    def __len__(self) -> int:
        return len(self.ids)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        with open(self.name(index), "rb") as file:
            return file.read(), -1

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self._names[index])

    def open_image(self, index: int) -> tuple[ScenePicture, int]:
        """The image with its objects, and -1. Raises `ImageError`."""
        with wrap_image_errors():
            picture = ScenePicture(self.read_bytes(index)[0], self.objects(index))
        if (picture.height, picture.width) != self.sizes[index]:
            height, width = self.sizes[index]
            raise ImageError(f"{picture.width} x {picture.height} pixels, but {width} x {height} in the annotations")
        return picture, -1

    def objects(self, index: int) -> list[dict[str, Any]]:
        """Those of one image: `label`, `bbox` [x, y, width, height] inside the image, `segmentation` (polygons or
        run lengths), `area`, `iscrowd`.
        """
        return json.loads(self._objects[index])

    def dataset(self) -> dict[str, Any]:
        """All of it in COCO's format, without what was left out. Annotations are numbered anew from 1: COCO's
        evaluation takes an id of 0 for none.
        """
        images = [
            {"id": id_, "file_name": name, "height": height, "width": width}
            for id_, name, (height, width) in zip(self.ids, self._names, self.sizes, strict=True)
        ]
        annotations = []
        for index, image_id in enumerate(self.ids):
            for thing in self.objects(index):
                category = self.categories[thing.pop("label")].id
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **thing})
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def open_coco(config: CocoFiles, split: str, empty: bool = True) -> CocoSet:
    """The `train` or `val` part, from the keys that name its files or from where it usually lies under `root`.

    empty: keep images without objects.
    """
    return CocoSet(*locate(config, split), config.max_errors, empty)


def locate(config: CocoFiles, split: str) -> tuple[Path, Path]:
    """(annotation file, folder of images) of a part. UserError where there is none; nothing is read."""
    names = [f"annotations/instances_{split}{year}.json" for year in ("2017", "")]
    annotations = _find(config, f"{split}_annotations", names)
    folders = [f"{split}2017", f"images/{split}2017", f"images/{split}", split, "images"]
    images = _find(config, f"{split}_images", folders)
    if not images.is_dir():
        raise UserError(f"data.{split}_images: {images} is not a folder; expected the folder of the images")
    return annotations, images


def _find(config: CocoFiles, key: str, usual: Sequence[str]) -> Path:
    given = getattr(config, key)
    if given:
        path = Path(given).expanduser()
        if not path.exists():
            near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
            raise UserError(f"data.{key}: {path} does not exist{near}")
        return path
    if not config.root:
        raise UserError(f"data.root: missing; expected the folder of a COCO set, as in data=coco, or data.{key}=...")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        near = did_you_mean(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(f"data.root: {root} is not a folder{near}; expected the folder of a COCO set")
    for name in usual:
        if (root / name).exists():
            return root / name
    raise UserError(f"data.{key}: {root} has none of {', '.join(usual)}; expected one of them, or data.{key}=...")


# -------------------- reading


def _read(path: Path) -> dict[str, list]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a COCO annotation file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected a COCO annotation file, whole") from error
    if not isinstance(content, dict):
        hint = " (detections are such a list; give the annotations)" if isinstance(content, list) else ""
        raise UserError(f"{path}: holds a {type(content).__name__}{hint}; expected COCO's object of lists")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{path}: has no list {key!r} of objects; expected images, annotations and categories")
        if key != "annotations" and not content[key]:
            raise UserError(f"{path}: its list {key!r} is empty; expected at least one")
    return content


def _categories(path: Path, entries: list[dict[str, Any]]) -> tuple[Category, ...]:
    for entry in entries:
        if not _whole(entry.get("id")):
            raise UserError(f"{path}: a category without a whole number as id ({_shown(entry)})")
    _unique(path, "categories", entries)
    return tuple(sorted((Category(e["id"], str(e.get("name", e["id"]))) for e in entries), key=lambda c: c.id))


def _entries(path: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries:
        name = entry.get("file_name")
        if not _whole(entry.get("id")) or not isinstance(name, str) or not name:
            raise UserError(f"{path}: an image without id or file_name ({_shown(entry)})")
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"{path}: image {entry['id']} lies outside its folder ({name!r}); expected a relative path")
        if not all(_whole(entry.get(key)) and entry[key] > 0 for key in ("height", "width")):
            raise UserError(f"{path}: image {entry['id']} ({name}) has no height and width in pixels")
    _unique(path, "images", entries)
    return entries


def _unique(path: Path, what: str, entries: list[dict[str, Any]]) -> None:
    seen: set[int] = set()
    for entry in entries:
        if entry["id"] in seen:
            raise UserError(f"{path}: two of its {what} have the id {entry['id']}; expected one")
        seen.add(entry["id"])


def _objects(
    path: Path, annotations: list[dict[str, Any]], entries: list[dict[str, Any]], categories: Sequence[Category]
) -> tuple[dict[int, list[dict[str, Any]]], dict[str, list]]:
    """(image id -> its objects, why left out -> annotation ids)."""
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in entries}
    labels = {category.id: label for label, category in enumerate(categories)}
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    left_out: dict[str, list] = defaultdict(list)
    for place, annotation in enumerate(annotations):
        try:
            image, category = annotation.get("image_id"), annotation.get("category_id")
            if not _whole(image) or image not in sizes:
                raise _Unusable("of images that are not listed")
            if not _whole(category) or category not in labels:
                raise _Unusable("of categories that are not listed")
            box = _box(annotation.get("bbox"), *sizes[image])
            mask = _mask(annotation.get("segmentation"), *sizes[image])
            area = annotation.get("area")
            if not _number(area) or area <= 0:
                area = float(coco_mask.area(encode(mask, *sizes[image])))
                if not area:
                    raise _Unusable("with an empty mask")
            thing = {"label": labels[category], "bbox": box, "segmentation": mask, "area": area}
            objects[image].append({**thing, "iscrowd": int(bool(annotation.get("iscrowd")))})
        except _Unusable as error:
            left_out[str(error)].append(annotation.get("id", f"number {place}"))
    return objects, dict(left_out)


class _Unusable(Exception):
    """An annotation that is left out; the message says which kind."""


def _box(box: Any, height: int, width: int) -> list[float]:
    """[x, y, width, height] inside the image."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_number, box)):
        raise _Unusable("without a box of four numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise _Unusable("with a box of zero size")
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if left >= right or top >= bottom:
        raise _Unusable("with a box outside the image")
    return [left, top, right - left, bottom - top]


def _mask(mask: Any, height: int, width: int) -> list[list[float]] | dict[str, Any]:
    """Polygons of at least three corners, or run lengths that cover the image."""
    if isinstance(mask, dict):
        counts = mask.get("counts")
        runs = _runs(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(_whole(run) and run >= 0 for run in runs):
            raise _Unusable("with a mask that is neither polygons nor run lengths")
        if mask.get("size") != [height, width] or sum(runs) != height * width:
            raise _Unusable("with a mask of another size than the image")
        if not sum(runs[1::2]):
            raise _Unusable("with an empty mask")
        return {"size": mask["size"], "counts": counts}
    if mask is None or mask == []:
        raise _Unusable("with an empty mask")
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        raise _Unusable("with a mask that is neither polygons nor run lengths")
    if not all(_number(value) for polygon in mask for value in polygon):
        raise _Unusable("with a mask that is neither polygons nor run lengths")
    polygons = [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        raise _Unusable("with an empty mask")
    return polygons


def _runs(text: str) -> list[int] | None:
    """Lengths of the runs in COCO's compressed code: groups of 5 bits from chr(48), from the fourth run on as the
    difference to the one before the last. None for what is no such code.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in text.encode():
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return None if shift else runs


def encode(mask: list[list[float]] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths of an image of this size -> COCO's compressed code, counts as bytes."""
    if isinstance(mask, list):
        return coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    if isinstance(mask["counts"], list):
        return coco_mask.frPyObjects(mask, height, width)
    return {"size": mask["size"], "counts": mask["counts"].encode()}


def _existing(folder: Path, names: list[str]) -> set[str]:
    """Those of the names that are files below the folder; each folder is listed once."""
    existing: set[str] = set()
    for parent in {os.path.dirname(name) for name in names}:
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, parent)) as entries:
            existing.update(os.path.normpath(os.path.join(parent, e.name)) for e in entries if e.is_file())
    return {name for name in names if os.path.normpath(name) in existing}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(entry: dict[str, Any]) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _some(items: Sequence[Any]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more


# -------------------- evaluation


def evaluate(truth: dict[str, Any], results: list[dict[str, Any]], per_class: bool = False) -> dict[str, float | None]:
    """COCO's average precision and recall of boxes and masks, each in [0, 1], or None where the truth has no such
    object.

    truth: as `CocoSet.dataset()`. results: COCO's results format, `bbox` and `segmentation` (compressed) in each.
    -> box_AP, box_AP50, box_AP75, box_APs, box_APm, box_APl, box_AR, the same of mask_, and with `per_class`
    box_AP/<name>, mask_AP/<name>.
    """
    figures: dict[str, float | None] = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        stats, of_class = _evaluated(truth, results, kind)
        figures |= {f"{name}_{figure}": _figure(stats[i]) for i, figure in enumerate(FIGURES)}
        figures[f"{name}_AR"] = _figure(stats[RECALL])
        if per_class:
            figures |= {f"{name}_AP/{category}": value for category, value in of_class.items()}
    return figures


def _evaluated(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str
) -> tuple[np.ndarray, dict[str, float | None]]:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        gold, found = COCO(), COCO()
        # COCOeval writes into the annotations
        gold.dataset = {**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]}
        gold.createIndex()
        found.dataset = {**truth, "annotations": [_result(r, i, kind) for i, r in enumerate(results, 1)]}
        found.createIndex()
        evaluation = COCOeval(gold, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # thresholds x recalls x categories, all areas, 100 detections
    names = {category["id"]: category["name"] for category in truth["categories"]}
    per_class = {}
    for place, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, place]
        per_class[names[category]] = float(values.mean()) if (values > -1).all() else None
    return evaluation.stats, per_class


def _result(result: dict[str, Any], number: int, kind: str) -> dict[str, Any]:
    """A detection as COCOeval wants it; its area decides about small, medium and large."""
    if kind == "bbox":
        area = result["bbox"][2] * result["bbox"][3]
        kept = {"bbox": result["bbox"]}
    else:
        area = float(coco_mask.area(result["segmentation"]))
        kept = {"segmentation": result["segmentation"], "bbox": result["bbox"]}
    same = {key: result[key] for key in ("image_id", "category_id", "score")}
    return {**same, **kept, "area": area, "id": number, "iscrowd": 0}


def _figure(value: float) -> float | None:
    return None if value < 0 else float(value)
