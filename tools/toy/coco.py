"""The detection dataset of `addp toy` in COCO's format: several digits in each scene, with boxes and masks."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from tools.toy.digits import DIGITS, DigitScans, contact_sheet, paste, random_color, save_image, textured
from tools.toy.recipe import Recipe, rng_for
from tools.toy.scenes import place_squares, scene_size

CATEGORY_IDS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)  # with a gap, as in COCO
FORMAT_VERSION = 1
MIN_PIXELS = 12  # an object with fewer visible pixels is not annotated


@dataclass(frozen=True)
class SceneObject:
    """A digit in a scene: its class, its visible pixels bool[h,w], and whether it is a crowd of digits."""

    digit: int
    mask: np.ndarray
    is_crowd: bool


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Return the mask with everything filled that cannot be reached from outside."""
    outside, _ = ndimage.label(~np.pad(mask, 1))
    return (outside != outside[0, 0])[1:-1, 1:-1]


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode a mask as COCO's uncompressed RLE: alternating runs of 0 and 1 down the columns, zeros first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Encode a mask without holes as COCO's polygons [x0, y0, x1, y1, ...] along the pixels' edges, one for each
    connected part.
    """
    labels, _ = ndimage.label(mask)
    outlines = []
    for label, (row_range, column_range) in enumerate(ndimage.find_objects(labels), 1):
        padded = np.pad(labels[row_range, column_range] == label, 1)
        y_offset, x_offset = row_range.start - 1, column_range.start - 1
        next_corner = {}  # clockwise: the part is on the right-hand side
        for row, column in np.argwhere(padded & ~ndimage.binary_erosion(padded)).tolist():
            x, y = x_offset + column, y_offset + row
            if not padded[row - 1, column]:
                next_corner[x, y] = x + 1, y
            if not padded[row, column + 1]:
                next_corner[x + 1, y] = x + 1, y + 1
            if not padded[row + 1, column]:
                next_corner[x + 1, y + 1] = x, y + 1
            if not padded[row, column - 1]:
                next_corner[x, y + 1] = x, y
        corners = [min(next_corner)]
        while (corner := next_corner[corners[-1]]) != corners[0]:
            corners.append(corner)
        neighbors = zip(corners[-1:] + corners[:-1], corners, corners[1:] + corners[:1], strict=True)
        turns = [here for last, here, next_ in neighbors if last[0] != next_[0] and last[1] != next_[1]]
        outlines.append([float(value) for corner in turns for value in corner])
    return outlines


def draw_scene(
    rng: np.random.Generator, recipe: Recipe, scans: DigitScans, split: str, number: int
) -> tuple[np.ndarray, list[SceneObject]]:
    """Return the image float[h,w,3] and its objects.

    As in COCO's polygons, the hole of a zero belongs to it. Every tenth scene holds a crowd of small digits under one
    mask; every twentieth is empty.
    """
    height, width = scene_size(rng, recipe)
    background = random_color(rng)
    image = textured(rng, height, width, background)
    if number % 20 == 7:
        return image, []
    drawn: list[SceneObject] = []
    short = min(height, width)
    if number % 10 == 3:
        digit, ink, small = int(rng.integers(10)), random_color(rng, background), round(short * 0.17)
        crowd = np.zeros((height, width), dtype=bool)
        top, left = int(rng.integers(0, height - 2 * small)), int(rng.integers(0, width - 4 * small))
        for row, column in np.ndindex(2, 4):
            jitter = rng.integers(-2, 3, 2)
            corner = max(0, top + row * small + int(jitter[0])), max(0, left + column * small + int(jitter[1]))
            crowd |= paste(image, scans.glyph(rng, split, digit, small), *corner, ink)
        drawn.append(SceneObject(digit, crowd, True))
    sizes = [round(short * rng.uniform(0.25, 0.6)) for _ in range(rng.integers(1, 6))]
    for top, left, size in place_squares(rng, height, width, sorted(sizes, reverse=True)):
        digit = int(rng.integers(10))
        mask = paste(image, scans.glyph(rng, split, digit, size), top, left, random_color(rng, background))
        drawn.append(SceneObject(digit, fill_holes(mask), False))
    return image, visible_objects(drawn, (height, width))


def visible_objects(drawn: list[SceneObject], size: tuple[int, int]) -> list[SceneObject]:
    """Return the objects (given in drawing order) with what later ones cover removed from their masks."""
    visible, covered = [], np.zeros(size, dtype=bool)
    for item in reversed(drawn):
        region = item.mask & ~covered
        covered |= item.mask
        if region.sum() >= MIN_PIXELS:
            visible.append(SceneObject(item.digit, region, item.is_crowd))
    return visible[::-1]


def annotation(item: SceneObject, use_rle: bool) -> dict[str, Any]:
    """Return COCO's annotation of an object, without its ids."""
    rows, columns = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    region = item.mask if use_rle else fill_holes(item.mask)  # polygons cannot leave out what lies inside a zero
    return {
        "category_id": CATEGORY_IDS[item.digit],
        "iscrowd": int(item.is_crowd),
        "area": int(region.sum()),
        "bbox": [float(edge) for edge in box],
        "segmentation": run_lengths(region) if use_rle else polygons(region),
    }


def categories_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the categories: the ten digits, or COCO's 80, among which the digits keep their ids."""
    if not recipe.coco_names:
        return [{"id": CATEGORY_IDS[digit], "name": str(digit), "supercategory": "digit"} for digit in DIGITS]
    # Imported late: it loads torchvision, and only this key needs COCO's names.
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [{"id": i, "name": name} for i, name in enumerate(names) if name not in ("__background__", "N/A")]


def split_files(folder: Path, split: str) -> tuple[Path, Path]:
    """Return (annotation file, image folder) of a split, named as in COCO."""
    return folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"


def write_coco(folder: Path, recipe: Recipe, scans: DigitScans) -> None:
    """Write {train,val}2017/*.jpg and annotations/instances_{train,val}2017.json."""
    categories = categories_of(recipe)
    image_ids, annotation_ids = itertools.count(1), itertools.count(1)  # unique over both files
    for split, count in (("train", recipe.coco_train), ("val", recipe.coco_val)):
        images, annotations = [], []
        path, image_folder = split_files(folder, split)
        for i in range(count):
            rng = rng_for(recipe, "coco", split, i)
            image, objects = draw_scene(rng, recipe, scans, split, i)
            image_id = next(image_ids)
            name = f"{image_id:012d}.jpg"
            save_image(image, image_folder / name)
            images.append({"id": image_id, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
            for item in objects:
                use_rle = item.is_crowd or rng.random() < recipe.coco_rle
                ids = {"id": next(annotation_ids), "image_id": image_id}
                annotations.append(ids | annotation(item, use_rle))
        content = {
            "info": {"description": "toy scenes of handwritten digits", "version": str(FORMAT_VERSION)},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def box_sheet(folder: Path) -> Image.Image:
    """Return validation scenes with boxes, labels and outlines: red for polygons, cyan for RLE, orange for crowds."""
    path, image_folder = split_files(folder, "val")
    content = json.loads(path.read_text())
    images = []
    for entry in content["images"][:20]:
        image = Image.open(image_folder / entry["file_name"]).convert("RGB")
        for item in (item for item in content["annotations"] if item["image_id"] == entry["id"]):
            mask = Image.new("L", image.size)
            if isinstance(item["segmentation"], dict):
                counts = item["segmentation"]["counts"]
                flat = np.repeat(np.arange(len(counts)) % 2, counts).reshape(image.size)
                mask = Image.fromarray((flat.T * 255).astype(np.uint8))
            else:
                for polygon in item["segmentation"]:
                    ImageDraw.Draw(mask).polygon(polygon, fill=255)
            color = "orange" if item["iscrowd"] else "cyan" if isinstance(item["segmentation"], dict) else "red"
            outline = mask.filter(ImageFilter.MaxFilter(3))
            outline.paste(0, mask=mask)
            image.paste(Image.new("RGB", image.size, color), mask=outline)
            x, y, width, height = item["bbox"]
            draw = ImageDraw.Draw(image)
            draw.rectangle((x, y, x + width - 1, y + height - 1), outline="white")
            draw.text((x + 2, y), str(CATEGORY_IDS.index(item["category_id"])), "white")
        images.append(image)
    return contact_sheet(images, 5)
