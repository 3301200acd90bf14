"""A COCO dataset: finding its files and reading its images with their objects.

Annotations that cannot be used are skipped, counted and named in one line of the log. Crowds are not trained on;
evaluation handles them as COCO's does.
"""

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.images import ImageError, LazyImage, wrap_image_errors
from addp_core.data.sources import ImageSource
from addp_core.data.stream import error_limit
from det.annotations import first_examples, read_annotations
from det.config import CocoFiles

log = logging.getLogger("addp")


class AnnotatedImage(LazyImage):
    """An encoded image with its `objects`, as returned by `CocoDataset.objects`."""

    def __init__(self, encoded: bytes, objects: list[dict[str, Any]]):
        super().__init__(encoded)
        self.objects = objects


class CocoDataset(ImageSource):
    """The images of a COCO annotation file with their objects.

    `categories` are sorted by id; an object's label is the position of its category. `sizes[i]` is (height, width) and
    `ids[i]` the id of image i. `skipped` maps the reasons why annotations were skipped to their ids. `missing` lists
    the image files that do not exist.

    Raises UserError if the file is missing, is not JSON or not COCO's, lists no image or category, or if more image
    files than `max_errors` allows are missing.
    """

    def __init__(self, annotations: Path, images: Path, max_errors: float = 0.0, keep_empty: bool = True):
        """Read the annotation file; no image is opened.

        Args:
            annotations: the annotation file.
            images: the folder of the images.
            max_errors: missing image files to tolerate, a number or a share of the dataset if below 1.
            keep_empty: keep images without objects; crowds do not count as objects.
        """
        self.path, self.folder = annotations, images
        content = read_annotations(annotations)
        self.categories = content.categories
        self.classes = tuple(category.name for category in self.categories)
        self.skipped = content.skipped
        if self.skipped:
            reasons = "; ".join(f"{len(ids)} {reason} ({first_examples(ids)})" for reason, ids in self.skipped.items())
            total = sum(map(len, self.skipped.values()))
            log.warning("data: %s: %d of %d annotations skipped: %s", annotations, total, content.total, reasons)
        names = [entry["file_name"] for entry in content.images]
        existing = _existing_files(images, names)
        self.missing = [name for name in names if name not in existing]
        self._check_missing(len(names), max_errors)
        kept = [
            entry
            for entry in content.images
            if keep_empty or any(not obj["iscrowd"] for obj in content.objects[entry["id"]])
        ]
        if not kept:
            raise UserError(f"{annotations}: no image has an object; expected at least one, or data.empty=true")
        self.ids = [entry["id"] for entry in kept]
        self.sizes = [(entry["height"], entry["width"]) for entry in kept]
        self._names = [entry["file_name"] for entry in kept]
        # Forked workers copy the memory pages of lists and dicts when they count references; those of bytes stay shared
        self._objects = [json.dumps(content.objects[entry["id"]]).encode() for entry in kept]
        log.info("data: %s: %s images, %d categories", annotations, f"{len(self):,}", len(self.categories))

    def _check_missing(self, total: int, max_errors: float) -> None:
        if not self.missing:
            return
        limit = error_limit(max_errors, total)
        count = f"{len(self.missing)} of {total} image files are missing in {self.folder}"
        message = f"{count} ({first_examples(self.missing)})"
        if len(self.missing) > limit:
            raise UserError(
                f"{self.path}: {message}, {limit} tolerated; expected the images of these annotations: "
                "give their folder, or raise data.max_errors"
            )
        log.warning("data: %s, %d tolerated", message, limit)

    def __len__(self) -> int:
        return len(self.ids)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        with open(self.name(index), "rb") as file:
            return file.read(), -1

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self._names[index])

    def open_image(self, index: int) -> tuple[AnnotatedImage, int]:
        """Return an image with its objects, and -1. Raises `ImageError`."""
        with wrap_image_errors():
            image = AnnotatedImage(self.read_bytes(index)[0], self.objects(index))
        if (image.height, image.width) != self.sizes[index]:
            height, width = self.sizes[index]
            raise ImageError(f"{image.width} x {image.height} pixels, but {width} x {height} in the annotations")
        return image, -1

    def objects(self, index: int) -> list[dict[str, Any]]:
        """Return the objects of one image: `label`, `bbox` [x, y, width, height] inside the image, `segmentation`
        (polygons or run lengths), `area`, `iscrowd`.
        """
        return json.loads(self._objects[index])

    def to_coco(self) -> dict[str, Any]:
        """Return the dataset in COCO's format, without the skipped annotations.

        Annotations are numbered anew from 1, because COCO's evaluation takes the id 0 for "no match".
        """
        images = [
            {"id": id_, "file_name": name, "height": height, "width": width}
            for id_, name, (height, width) in zip(self.ids, self._names, self.sizes, strict=True)
        ]
        annotations: list[dict[str, Any]] = []
        for index, image_id in enumerate(self.ids):
            for obj in self.objects(index):
                category = self.categories[obj.pop("label")].id
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **obj})
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def open_coco(config: CocoFiles, split: str, keep_empty: bool = True) -> CocoDataset:
    """Open the "train" or "val" split from the keys that name its files, or from their usual places under `root`.

    keep_empty: keep images without objects.
    """
    return CocoDataset(*locate_coco(config, split), config.max_errors, keep_empty)


def locate_coco(config: CocoFiles, split: str) -> tuple[Path, Path]:
    """Return (annotation file, image folder) of a split without reading them. Raises UserError if there are none."""
    names = [f"annotations/instances_{split}{year}.json" for year in ("2017", "")]
    annotations = _find_path(config, f"{split}_annotations", names)
    folders = [f"{split}2017", f"images/{split}2017", f"images/{split}", split, "images"]
    images = _find_path(config, f"{split}_images", folders)
    if not images.is_dir():
        raise UserError(f"data.{split}_images: {images} is not a folder; expected the folder of the images")
    return annotations, images


def _find_path(config: CocoFiles, key: str, candidates: Sequence[str]) -> Path:
    """Return the path that `key` names, or the first of `candidates` that exists under `root`."""
    value = getattr(config, key)
    if value:
        path = Path(value).expanduser()
        if not path.exists():
            hint = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
            raise UserError(f"data.{key}: {path} does not exist{hint}")
        return path
    if not config.root:
        raise UserError(f"data.root: missing; expected the folder of a COCO dataset, as in data=coco, or data.{key}")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        hint = did_you_mean(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(f"data.root: {root} is not a folder{hint}; expected the folder of a COCO dataset")
    for name in candidates:
        if (root / name).exists():
            return root / name
    raise UserError(f"data.{key}: {root} has none of {', '.join(candidates)}; expected one of them, or data.{key}")


def _existing_files(folder: Path, names: list[str]) -> set[str]:
    """Return the names that are files below the folder; every directory is listed once."""
    existing: set[str] = set()
    for parent in {os.path.dirname(name) for name in names}:
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, parent)) as entries:
            existing.update(os.path.normpath(os.path.join(parent, e.name)) for e in entries if e.is_file())
    return {name for name in names if os.path.normpath(name) in existing}
