"""COCO's mask formats: polygons, run lengths and the compressed run-length code, and conversions between them."""

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

Segmentation = list[list[float]] | dict[str, Any]
"""An object's mask: polygons [[x, y, x, y, ...], ...], or run lengths {"size": [H, W], "counts": list or str}."""


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Convert polygons or run lengths on an image of this size to COCO's compressed code, `counts` as bytes."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return {"size": segmentation["size"], "counts": segmentation["counts"].encode()}


def encode_bitmap(mask: Tensor) -> dict[str, Any]:
    """Bool[H,W] or UInt8[H,W] of 0 and 1 -> COCO's compressed code, `counts` as bytes."""
    return coco_mask.encode(np.asfortranarray(mask.to(torch.uint8).cpu().numpy()))


def parse_counts(counts: str) -> list[int] | None:
    """Return the run lengths in the `counts` of COCO's compressed code, or None if the string is not valid code.

    The code holds groups of 5 bits offset by chr(48); from the fourth run on it stores the difference to the run two
    places earlier.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts.encode():
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


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the edges (left, top, right, bottom) around the nonzero pixels of a mask that has at least one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
