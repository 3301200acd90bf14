"""COCO's mask formats: polygons, run lengths and the compressed run-length code, and conversions between them."""

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

Segmentation = list[list[float]] | dict[str, Any]
"""An object's mask: polygons [[x, y, x, y, ...], ...], or run lengths {"size": [H, W], "counts": list or str}."""

Extent = tuple[float, float, float, float]  # left, top, right, bottom
MAX_COORDINATE = 1e9  # larger coordinates are cut off before clipping, whose products would overflow


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Convert polygons or run lengths on an image of this size to COCO's compressed code, `counts` as bytes.

    Polygons may reach outside the image.
    """
    if isinstance(segmentation, list):
        polygons = clip_far_polygons(segmentation, height, width)
        if not polygons:
            return coco_mask.encode(np.zeros((height, width), dtype=np.uint8, order="F"))
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return {"size": segmentation["size"], "counts": segmentation["counts"].encode()}


def clip_far_polygons(polygons: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Clip the polygons that reach far outside an image of this size: COCO's rasterizer follows every edge pixel by
    pixel, and one corner at 2e8 would take all memory.

    Far is twice the image's longer side: clipping shifts the edges that it cuts by up to a tenth of a pixel, so
    ordinary polygons are left alone. They are returned as they are, and the same list if no polygon was clipped.
    """
    margin = 2.0 * max(height, width)
    lows, highs = (-margin, -margin), (width + margin, height + margin)
    if all(_is_inside(polygon, lows, highs) for polygon in polygons):
        return polygons
    clipped = [p if _is_inside(p, lows, highs) else _clip_polygon(p, lows, highs) for p in polygons]
    return [polygon for polygon in clipped if len(polygon) >= 6]


def _is_inside(polygon: list[float], lows: tuple[float, float], highs: tuple[float, float]) -> bool:
    axes = (polygon[::2], polygon[1::2])
    return all(low <= min(a) and max(a) <= high for a, low, high in zip(axes, lows, highs, strict=True))


def _clip_polygon(polygon: list[float], lows: tuple[float, float], highs: tuple[float, float]) -> list[float]:
    """Return the part of a polygon inside a rectangle (Sutherland and Hodgman's algorithm)."""
    points = np.clip(np.reshape(polygon, (-1, 2)), -MAX_COORDINATE, MAX_COORDINATE)
    for axis in (0, 1):
        for limit, sign in ((lows[axis], 1.0), (highs[axis], -1.0)):
            following = np.roll(points, -1, axis=0)
            depth, next_depth = sign * (points[:, axis] - limit), sign * (following[:, axis] - limit)
            crosses = (depth >= 0) != (next_depth >= 0)
            share = depth / np.where(crosses, depth - next_depth, 1.0)
            crossing = points + share[:, None] * (following - points)
            crossing[:, axis] = limit
            both, kept = np.stack([points, crossing], 1), np.stack([depth >= 0, crosses], 1)
            points = both[kept]
    return points.ravel().tolist()


def mask_extent(segmentation: Segmentation) -> Extent:
    """Return the edges around polygons, or around the pixels of run lengths."""
    if isinstance(segmentation, list):
        xs, ys = [value for p in segmentation for value in p[::2]], [value for p in segmentation for value in p[1::2]]
        return min(xs), min(ys), max(xs), max(ys)
    left, top, w, h = coco_mask.toBbox(to_rle(segmentation, *segmentation["size"])).tolist()
    return left, top, left + w, top + h


def mask_area(segmentation: Segmentation, height: int, width: int) -> float:
    """Return the number of pixels of a mask on an image of this size."""
    return float(coco_mask.area(to_rle(segmentation, height, width)))


def box_iou(a: Extent, b: Extent) -> float:
    """Return the intersection over union of two boxes, 0 for boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [max(right - left, 0.0) * max(bottom - top, 0.0) for left, top, right, bottom in (a, b)]
    return shared / (sum(areas) - shared) if shared else 0.0


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
