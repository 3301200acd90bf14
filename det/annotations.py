"""Reads a COCO annotation file: its images and categories. A file that is not COCO's is a UserError."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from addp_core.base.errors import UserError
from det.config import Category
from det.objects import ParsedObjects, parse_id, parse_objects

MAX_EXAMPLES = 3  # items listed in a message about many


@dataclass
class CocoAnnotations:
    """The checked content of an annotation file."""

    images: list[dict[str, Any]]  # as in the file; id, file_name, height and width are valid
    categories: tuple[Category, ...]  # sorted by id; an object's label is the position in this tuple
    objects: ParsedObjects
    total: int  # annotations in the file
    converted_ids: list[Any]  # ids of images and categories that the file holds as text or decimal numbers


def read_annotations(path: Path, masks: Literal["auto"] | bool = "auto") -> CocoAnnotations:
    """Read and check an annotation file.

    masks: whether objects need masks; "auto": unless the file has none.
    Raises UserError if the file is missing, is not COCO's or lists no image.
    """
    content = _read_json(path)
    images = _parse_images(path, content["images"])
    categories = _parse_categories(path, content["categories"])
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
    objects = parse_objects(content["annotations"], sizes, categories, masks)
    ids = [entry["id"] for key in ("images", "categories") for entry in content[key]]
    converted = [repr(id_) for id_ in ids if type(id_) is not int]
    return CocoAnnotations(images, categories, objects, len(content["annotations"]), converted)


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
    ids = [parse_id(entry.get("id")) for entry in entries]
    for id_, entry in zip(ids, entries, strict=True):
        if id_ is None:
            raise UserError(f"{path}: found a category without an integer id: {_abbreviate(entry)}")
    numbered = [{**entry, "id": id_} for id_, entry in zip(ids, entries, strict=True)]
    _check_unique_ids(path, "categories", numbered)
    return tuple(sorted((Category(e["id"], str(e.get("name", e["id"]))) for e in numbered), key=lambda c: c.id))


def _parse_images(path: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    images = []
    for entry in entries:
        name, numbers = entry.get("file_name"), {key: parse_id(entry.get(key)) for key in ("id", "height", "width")}
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: found an image without file_name: {_abbreviate(entry)}")
        if numbers["id"] is None:
            raise UserError(f"{path}: found an image whose id is not a whole number: {_abbreviate(entry)}")
        if not all((numbers[key] or 0) > 0 for key in ("height", "width")):
            raise UserError(f"{path}: image {numbers['id']} ({name}) has no height and width in pixels")
        images.append({**entry, **numbers})
    _check_unique_ids(path, "images", images)
    return images


def _check_unique_ids(path: Path, key: str, entries: list[dict[str, Any]]) -> None:
    seen: set[int] = set()
    for entry in entries:
        if entry["id"] in seen:
            raise UserError(f"{path}: two of its {key} have the id {entry['id']}; expected unique ids")
        seen.add(entry["id"])


def _abbreviate(entry: dict[str, Any]) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 80 else f"{text[:77]}..."
