"""Small COCO files for the tests: images of 30 x 20 pixels, two categories with gaps in their ids."""

from collections.abc import Callable
from typing import Any

import numpy as np

from det.masks import to_rle

HEIGHT, WIDTH = 20, 30


def rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    """Return the polygon of a box."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(number: int, image_id: int, category_id: int, box: tuple, /, **changes: Any) -> dict[str, Any]:
    """Return an annotation whose mask is its box; `changes` replace single entries."""
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(map(float, box))}
    entry |= {"iscrowd": 0, "area": float(box[2] * box[3]), "segmentation": rectangle(*map(float, box))}
    return entry | changes


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return COCO's run lengths of a mask, column by column."""
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, flat.size]).tolist()


def box_run_lengths(x: int, y: int, w: int, h: int) -> list[int]:
    """Return COCO's run lengths of a rectangle in the image."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=int)
    mask[y : y + h, x : x + w] = 1
    return run_lengths(mask)


def coco_content(*annotations: dict[str, Any], images: int = 2) -> dict[str, Any]:
    """Return an annotation file with the image ids 0, 10, 20, ... and the files 0.png, 1.png, 2.png, ..."""
    entries = [{"id": 10 * i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(images)]
    categories = [{"id": 7, "name": "seven"}, {"id": 2, "name": "two"}]  # unsorted, with gaps
    return {"images": entries, "annotations": list(annotations), "categories": categories}


def compressed(code: dict[str, Any]) -> dict[str, Any]:
    """Return pycocotools' run-length code as results files hold it, with `counts` as text."""
    return {"size": code["size"], "counts": code["counts"].decode()}


def perfect_results(ground_truth: dict[str, Any], score: Callable[[int], float] = lambda i: 1.0) -> list[dict]:
    """Return the ground truth as a detector would report it, without crowds."""
    results = []
    for i, entry in enumerate(ground_truth["annotations"]):
        code = compressed(to_rle(entry["segmentation"], HEIGHT, WIDTH))
        common = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
        if not entry["iscrowd"]:
            results.append({**common, "segmentation": code, "score": score(i)})
    return results
