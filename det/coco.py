"""A COCO dataset: finding its files and reading its images with their objects.

Annotations that cannot be used are skipped, and a line of the log counts and names them; another one those that are
written differently from COCO. Crowds are not trained on; evaluation handles them as COCO's does.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from addp_core.base.addresses import refuse_address
from addp_core.base.cpu import usable_cores
from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.paths import expand_home
from addp_core.data.images import ImageError, LazyImage, wrap_image_errors
from addp_core.data.sources import ImageSource
from addp_core.data.stream import error_limit
from det.annotations import CocoAnnotations, first_examples, read_annotations
from det.config import CocoFiles, MaskChoice, distinct_names
from det.image_files import find_image_files, is_inside
from det.objects import MASK_PROBLEMS

log = logging.getLogger("addp")

CROWDS = "crowds (iscrowd=1), which are not trained on"


class AnnotatedImage(LazyImage):
    """An encoded image with its `objects`, as returned by `CocoDataset.objects`."""

    def __init__(self, encoded: bytes, objects: list[dict[str, Any]]):
        super().__init__(encoded)
        self.objects = objects


class CocoDataset(ImageSource):
    """The images of a COCO annotation file with their objects.

    `categories` are sorted by id; an object's label is the position of its category. `masks` says whether all objects
    have masks or none has. `sizes[i]` is (height, width) and `ids[i]` the id of image i. `skipped` maps the reasons why
    annotations were skipped to their ids. `missing` lists the image files that do not exist.

    Raises UserError if the file is missing, is not JSON or not COCO's, lists no image or category, or if more image
    files than `max_errors` allows are missing.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        max_errors: float = 0.0,
        keep_empty: bool = True,
        masks: MaskChoice = "auto",
    ):
        """Read the annotation file; no image is opened.

        Args:
            annotations: the annotation file.
            images: the folder of the images.
            max_errors: missing or unreadable images to tolerate, a number or a share of the dataset if below 1.
            keep_empty: keep images without objects; crowds do not count as objects.
            masks: whether objects need masks; "auto": unless the file has none.
        """
        self.path, self.folder, self.max_errors = annotations, images, max_errors
        content = read_annotations(annotations, masks)
        self.categories, self.masks = content.categories, content.objects.masks
        self.classes = distinct_names(self.categories)
        self.skipped = content.objects.skipped
        objects = content.objects.by_image
        self._crowds = sum(bool(obj["iscrowd"]) for each in objects.values() for obj in each)
        self._trainable = sum(map(len, objects.values())) - self._crowds
        self._total = content.total
        self._log_annotations(content)
        names = self._find_images([entry["file_name"] for entry in content.images])
        kept = [
            (entry, name)
            for entry, name in zip(content.images, names, strict=True)
            if keep_empty or any(not obj["iscrowd"] for obj in objects.get(entry["id"], ()))
        ]
        if not kept:
            raise UserError(self._describe_lack())
        self.ids = [entry["id"] for entry, _ in kept]
        self.sizes = [(entry["height"], entry["width"]) for entry, _ in kept]
        self._names = [name for _, name in kept]
        # Forked workers copy the memory pages of lists and dicts when they count references; those of bytes stay shared
        self._objects = [json.dumps(objects.get(entry["id"], [])).encode() for entry, _ in kept]
        log.info("data: %s: %s images, %d categories", annotations, f"{len(self):,}", len(self.categories))

    def check_objects(self) -> None:
        """Raise UserError with the reason if the dataset has no object to train on or to evaluate with."""
        if not self._trainable:
            raise UserError(self._describe_lack())

    def check_readable(self, samples: int | None = None) -> None:
        """Decode all images, or up to `samples` of them across the dataset.

        Raises UserError if more than `max_errors` of them are unreadable, or all, or more than half where `max_errors`
        is at most a quarter of the dataset.
        """
        samples = len(self) if samples is None else samples
        indices = sorted({i * len(self) // samples for i in range(samples)})
        log.info("data: %s: reading %d of %d images to check them", self.path, len(indices), len(self))
        with ThreadPoolExecutor(usable_cores()) as pool:
            reasons = pool.map(self._why_unreadable, indices)
            bar = tqdm(reasons, "check", len(indices), leave=False, unit="img", disable=None)
            errors = [(self.name(index), reason) for index, reason in zip(indices, bar, strict=True) if reason]
        self.check_errors(errors)
        tolerated = error_limit(self.max_errors, len(self)) / len(self)
        if len(errors) == len(indices) or (tolerated <= 0.25 and 2 * len(errors) > len(indices)):
            raise UserError(
                f"data.max_errors: {len(errors)} of {len(indices)} images of {self.path} that were looked at are "
                f"unreadable: {first_examples([f'{name} ({reason})' for name, reason in errors])}; repair them"
            )

    def _why_unreadable(self, index: int) -> str:
        """Return why an image cannot be read, or "" if it can."""
        try:
            self.open_image(index)[0].pixels()
        except ImageError as error:
            return str(error)
        return ""

    def check_errors(self, errors: Sequence[tuple[str, str]]) -> None:
        """Raise UserError if these (name, reason) of unreadable images are more than `max_errors` allows."""
        limit = error_limit(self.max_errors, len(self))
        if len(errors) > limit:
            examples = first_examples([f"{name} ({reason})" for name, reason in errors])
            raise UserError(
                f"data.max_errors: at least {len(errors)} of {len(self)} images of {self.path} are unreadable, {limit} "
                f"tolerated: {examples}; repair or remove them, or raise data.max_errors"
            )

    def _log_annotations(self, content: CocoAnnotations) -> None:
        """Log what was skipped, read differently, or is probably wrong."""
        lost = sum(map(len, self.skipped.values()))
        most = "most annotations are lost: " if 2 * lost > self._total else ""
        if self.skipped:
            log.warning(
                "data: %s: %s%d of %d annotations skipped: %s%s",
                self.path,
                most,
                lost,
                self._total,
                _count_by_reason(self.skipped),
                self._hint() if most else "",
            )
        if content.converted_ids:
            ids = first_examples(content.converted_ids)
            log.warning("data: %s: ids of images or categories were read as whole numbers: %s", self.path, ids)
        if content.objects.repaired:
            log.warning("data: %s: read annotations %s", self.path, _count_by_reason(content.objects.repaired))
        if content.objects.doubtful:
            log.warning(
                "data: %s: annotations that are probably wrong: %s",
                self.path,
                _count_by_reason(content.objects.doubtful),
            )
        if self._crowds > self._trainable:
            log.warning("data: %s: %d of %d objects are %s", self.path, self._crowds, self._total, CROWDS)
        if self._trainable and not self.masks:
            log.info("data: %s: boxes alone, without masks", self.path)
        names = [category.name for category in self.categories]
        if len(set(names)) < len(names):
            shared = [new for new, old in zip(self.classes, names, strict=True) if new != old]
            log.warning(
                "data: %s: several categories have one name; they are shown as %s", self.path, first_examples(shared)
            )

    def _describe_lack(self) -> str:
        """Return why the dataset has no object, as the message of an error."""
        reasons = _count_by_reason(self.skipped)
        if self._crowds:
            reasons = "; ".join(filter(None, [reasons, f"{self._crowds} {CROWDS}"]))
        message = f"{self.path}: no image has an object"
        if not self._total:
            return f"{message}: its list 'annotations' is empty; expected at least one annotation"
        return f"{message}: of {self._total} annotations, {reasons}; expected at least one usable object{self._hint()}"

    def _hint(self) -> str:
        return "; detector.masks=false trains on boxes alone" if self.skipped.keys() & MASK_PROBLEMS else ""

    def _find_images(self, names: list[str]) -> list[str]:
        """Return the paths of the images below the folder, and set `missing` to the names that have no file."""
        paths = find_image_files(self.folder, names)
        self.missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        outside = [name for name in self.missing if not is_inside(name)]
        if outside:
            raise UserError(
                f"{self.path}: an image lies outside the image folder ({outside[0]!r}); expected a path below "
                f"{self.folder}"
            )
        moved = [f"{name} as {path}" for name, path in zip(names, paths, strict=True) if path not in (None, name)]
        if moved:
            log.warning(
                "data: %s: %d of %d images were found in %s by the last part of their file_name (%s)",
                self.path,
                len(moved),
                len(names),
                self.folder,
                first_examples(moved),
            )
        self._check_missing(len(names))
        return [path or name for name, path in zip(names, paths, strict=True)]

    def _check_missing(self, total: int) -> None:
        if not self.missing:
            return
        limit = error_limit(self.max_errors, total)
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
        height, width = self.sizes[index]
        if (image.height, image.width) != (height, width):
            swapped = (image.width, image.height) == (height, width)
            hint = ": were the annotations made without the image's EXIF orientation?" if swapped else ""
            raise ImageError(f"{image.width} x {image.height} pixels, but {width} x {height} in the annotations{hint}")
        return image, -1

    def objects(self, index: int) -> list[dict[str, Any]]:
        """Return the objects of one image: `label`, `bbox` [x, y, width, height] inside the image, `segmentation`
        (polygons or run lengths, None without `masks`), `area`, `iscrowd`.
        """
        return json.loads(self._objects[index])

    def areas(self) -> list[float]:
        """Return the area of each object that is no crowd."""
        return [obj["area"] for index in range(len(self)) for obj in self.objects(index) if not obj["iscrowd"]]

    def digest(self) -> str:
        """Return a digest of the listing of the images, and of the objects of each."""
        digest = hashlib.blake2b(super().digest().encode(), digest_size=16)
        for id_, objects in zip(self.ids, self._objects, strict=True):
            digest.update(f"{id_} ".encode() + objects)
        return digest.hexdigest()

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
                if obj["segmentation"] is None:
                    del obj["segmentation"]
                category = self.categories[obj.pop("label")].id
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **obj})
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def open_coco(config: CocoFiles, split: str, keep_empty: bool = True, masks: MaskChoice = "auto") -> CocoDataset:
    """Open the "train" or "val" split from the keys that name its files, or from their usual places under `root`.

    keep_empty: keep images without objects. masks: whether objects need masks; "auto": unless the file has none.
    Raises UserError as `CocoDataset` does, or if the split has no object.
    """
    dataset = CocoDataset(*locate_coco(config, split), config.max_errors, keep_empty, masks)
    dataset.check_objects()
    return dataset


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
    refuse_address(value, f"data.{key}")
    refuse_address(config.root, "data.root")
    if value:
        path = expand_home(value)
        if not path.exists():
            hint = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
            raise UserError(f"data.{key}: {path} does not exist{hint}")
        return path
    if not config.root:
        raise UserError(f"data.root: missing; expected the folder of a COCO dataset, as in data=coco, or data.{key}")
    root = expand_home(config.root)
    if not root.is_dir():
        hint = did_you_mean(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(f"data.root: {root} is not a folder{hint}; expected the folder of a COCO dataset")
    for name in candidates:
        if (root / name).exists():
            return root / name
    raise UserError(f"data.{key}: {root} has none of {', '.join(candidates)}; expected one of them, or data.{key}")


def _count_by_reason(ids: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{len(some)} {reason} ({first_examples(some)})" for reason, some in ids.items())
