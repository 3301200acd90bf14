"""`addp toy out=DIR`: small sets in the real formats, for trying every task in minutes without a download.

The things in the pictures are the 1,797 handwritten digits that scikit-learn ships (8 x 8 scans), enlarged, coloured
and laid on coloured grounds. A scan is used for training or for validation, never for both. Every picture is a
function of the seed, its set and its number.

    imagenet/         train/<class>/*.JPEG, val/<class>/*.JPEG; classes "0" to "9"
    coco/             images/*.jpg, annotations/instances_{train,val}.json; polygons, some run-length masks and crowds;
                      category ids 1-5 and 7-11, with a gap as in COCO
    ade20k/           images/{training,validation}/*.jpg, annotations/.../*.png: 0 other, 1-10 digits, 11-13 grounds;
                      objectInfo.txt names them
    imagenet-a/       hard pictures of six of the classes: turned, small, faint, cluttered, partly covered
    imagenet-r/       six classes in other renditions: outlines, halftone dots, neon, mosaic, negative
    sketch/           all classes as pencil drawings
    imagenet-c/       <corruption>/<severity>/<class>/*.JPEG: the same validation pictures 15 x 5 times
    contact/          one picture of each set to look at
"""

import colorsys
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Interval
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from addp_core.base.errors import UserError
from addp_core.data.corruptions import CORRUPTIONS, JPEG_QUALITY, SEVERITIES, apply_corruption, smooth_noise

log = logging.getLogger("addp")

SetName = Literal["imagenet", "coco", "ade20k", "imagenet-a", "imagenet-r", "sketch", "imagenet-c"]
DIGITS = tuple(range(10))
CLASSES_A = (0, 2, 3, 5, 7, 8)  # as in the real sets, some of the classes only, and not the same ones
CLASSES_R = (0, 1, 3, 4, 6, 9)
CATEGORY_IDS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)
GROUNDS = {"sky": (0.53, 0.62), "grass": (0.25, 0.38), "sand": (0.08, 0.14)}  # name: hues
OTHER = 0


@dataclass
class Recipe:
    """Toy sets of handwritten digits in the formats of the real ones."""

    out: Annotated[str, "folder for the sets, one folder each"]
    seed: Annotated[int, Ge(0), "the same seed gives the same files"] = 0
    only: Annotated[list[SetName], "sets to make, as in only=[coco,ade20k]; all by default"] = field(
        default_factory=list
    )
    size: Annotated[int, Interval(ge=16, le=512), "pixels of a side of the classification pictures"] = 64
    scene: Annotated[int, Interval(ge=48, le=1024), "pixels of the shorter side of the scenes in coco and ade20k"] = 96
    imagenet_train: Annotated[int, Ge(10), "pictures in imagenet/train"] = 2000
    imagenet_val: Annotated[int, Ge(10), "pictures in imagenet/val"] = 500
    coco_train: Annotated[int, Ge(1), "training scenes in coco"] = 400
    coco_val: Annotated[int, Ge(1), "validation scenes in coco"] = 100
    coco_rle: Annotated[float, Interval(ge=0, le=1), "share of single things with a run-length mask, not polygons"] = (
        0.1
    )
    ade_train: Annotated[int, Ge(1), "training scenes in ade20k"] = 400
    ade_val: Annotated[int, Ge(1), "validation scenes in ade20k"] = 100
    variants: Annotated[int, Ge(6), "pictures in each of imagenet-a, imagenet-r and sketch"] = 200
    corrupted: Annotated[int, Ge(1), "pictures of each corruption and severity in imagenet-c"] = 30


def run(recipe: Recipe) -> None:
    """Makes the sets that are missing. A set appears under its name when it is whole; one made otherwise is refused."""
    out = Path(recipe.out).expanduser()
    scans = Scans()
    try:
        for name in recipe.only or SETS:
            make_set(name, recipe, scans, out)
    except OSError as error:
        raise UserError(f"out: {error.filename or out} cannot be written: {error.strerror or error}") from error


def make_set(name: SetName, recipe: Recipe, scans: "Scans", out: Path) -> None:
    """Writes one set under a temporary name, then its contact sheet, then renames it."""
    write, sheet, keys = SETS[name]
    settings = {"set": name, "version": version(name), "seed": recipe.seed}
    settings |= {key: getattr(recipe, key) for key in keys}
    folder, partial = out / name, out / f".tmp-{name}"
    if folder.exists():
        check_made_alike(folder, settings)
        log.info("toy: %s is there already", folder)
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial, recipe, scans)
    (out / "contact").mkdir(exist_ok=True)
    unfinished = out / "contact" / f".tmp-{name}.png"
    sheet(partial).save(unfinished)
    os.replace(unfinished, out / "contact" / f"{name}.png")
    (partial / "toy.json").write_text(json.dumps(settings, indent=1) + "\n")
    os.rename(partial, folder)
    log.info("toy: wrote %s", folder)


def version(name: SetName) -> int:
    """Of a set's pictures and files: a folder made by another one is refused, not mixed."""
    return 2 if name == "imagenet-c" else 1


def check_made_alike(folder: Path, settings: dict[str, Any]) -> None:
    """Raises `UserError` unless the set in this folder was made with these settings."""
    try:
        found = json.loads((folder / "toy.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"out: {folder} exists and was not made by addp toy; choose another folder") from error
    for key, value in settings.items():
        if found.get(key) != value:
            raise UserError(
                f"{key}: {value}, but {folder} was made with {key}={found.get(key)}; "
                "choose another out= or remove that folder"
            )


def rng_for(recipe: Recipe, *parts: int | str) -> np.random.Generator:
    # imported late: torch is slow to load, and `addp toy --help` has no need of it
    from addp_core.base.rng import seed_for

    return np.random.default_rng(seed_for(recipe.seed, "toy", *parts))


# ----------------------------------------------------------------------------------------------------------- drawing


class Scans:
    """scikit-learn's digits, split by scan: four fifths of each class for training, the rest for validation."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # late, as above

        digits = load_digits()
        scans = np.pad(digits.images / 16, ((0, 0), (1, 1), (1, 1)))
        order = np.random.default_rng(0).permutation(len(scans))  # not the recipe's seed: the split is always the same
        self._pools: dict[tuple[str, int], np.ndarray] = {}
        for digit in DIGITS:
            own = scans[order[digits.target[order] == digit]]
            cut = len(own) * 4 // 5
            self._pools["train", digit], self._pools["val", digit] = own[:cut], own[cut:]

    def pool(self, split: str, digit: int) -> np.ndarray:
        """float[n,10,10] in [0,1], a blank border included."""
        return self._pools[split, digit]

    def glyph(self, rng: np.random.Generator, split: str, digit: int, height: int, turn: float = 12) -> np.ndarray:
        """float[height,height] in [0,1]: one scan with crisp edges, turned by up to `turn` degrees."""
        pool = self.pool(split, digit)
        scan = Image.fromarray(pool[rng.integers(len(pool))].astype(np.float32))
        large = scan.resize((height, height), Image.Resampling.BICUBIC)
        large = large.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC)
        edge = np.clip((np.asarray(large, dtype=np.float64) - 0.38) / 0.25, 0, 1)
        return edge * edge * (3 - 2 * edge)


def colour(rng: np.random.Generator, unlike: np.ndarray | None = None, contrast: float = 0.35) -> np.ndarray:
    """float[3]: any but a dark grey colour, its brightness at least `contrast` from that of the colour `unlike`."""
    while True:
        found = np.array(colorsys.hsv_to_rgb(*rng.uniform((0, 0.2, 0.15), (1, 0.9, 1))))
        if unlike is None or abs((found - unlike) @ (0.3, 0.59, 0.11)) >= contrast:
            return found


def textured(rng: np.random.Generator, height: int, width: int, colour: np.ndarray) -> np.ndarray:
    """float[h,w,3]: the colour with a slope of light, soft blotches and a little grain."""
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 0.07 * (rows * np.sin(angle) + columns * np.cos(angle)) + 0.03 * smooth_noise(rng, height, width, 4)
    grain = rng.normal(0, 0.015, (height, width, 3))
    return np.clip(colour + light[..., None] + grain, 0, 1)


def lay(image: np.ndarray, glyph: np.ndarray, top: int, left: int, ink: np.ndarray) -> np.ndarray:
    """Draws the glyph into `image` (in place), cut at its edges, and returns bool[h,w]: where it is now."""
    height, width = image.shape[:2]
    rows = slice(max(0, top), min(height, top + glyph.shape[0]))
    columns = slice(max(0, left), min(width, left + glyph.shape[1]))
    alpha = np.zeros((height, width, 1))
    alpha[rows, columns, 0] = glyph[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    image += alpha * (ink - image)
    return alpha[..., 0] > 0.5


def save(image: np.ndarray, path: Path, quality: int = 92) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255 + 0.5)).save(path, "JPEG", quality=quality, subsampling=0)


def single(rng: np.random.Generator, scans: Scans, split: str, digit: int, size: int) -> np.ndarray:
    """float[size,size,3]: one large digit on a ground."""
    ground = colour(rng)
    image = textured(rng, size, size, ground)
    height = round(size * rng.uniform(0.7, 1.0))
    top, left = (round(rng.uniform(-0.04, 1.04) * (size - height)) for _ in range(2))
    lay(image, scans.glyph(rng, split, digit, height), top, left, colour(rng, ground))
    return image


# ------------------------------------------------------------------------------------------------- classification sets


def write_imagenet(folder: Path, recipe: Recipe, scans: Scans) -> None:
    for split, count in (("train", recipe.imagenet_train), ("val", recipe.imagenet_val)):
        for i in range(count):
            image = single(rng_for(recipe, "imagenet", split, i), scans, split, i % 10, recipe.size)
            save(image, folder / split / str(i % 10) / f"{split}_{i:06d}.JPEG")


def hard(rng: np.random.Generator, scans: Scans, digit: int, size: int) -> np.ndarray:
    """A picture that a classifier trained on `single` gets wrong more often."""
    ground = colour(rng)
    image = textured(rng, size, size, ground)
    for _ in range(rng.integers(1, 4)):  # clutter: strokes of other digits, faint
        other = scans.glyph(rng, "val", int(rng.integers(10)), round(size * rng.uniform(0.3, 0.6)), turn=180)
        top, left = rng.integers(-size // 4, size, 2)
        lay(image, 0.6 * other, int(top), int(left), colour(rng))
    height = round(size * rng.uniform(0.45, 0.75))
    top, left = (int(rng.integers(0, size - height + 1)) for _ in range(2))
    lay(image, scans.glyph(rng, "val", digit, height, turn=40), top, left, colour(rng, ground, contrast=0.2))
    if rng.random() < 0.4:  # a bar in front
        bar = int(rng.integers(0, size - size // 8))
        band = np.index_exp[bar : bar + size // 10] if rng.random() < 0.5 else np.index_exp[:, bar : bar + size // 10]
        image[band] = colour(rng)
    return image


def rendition(rng: np.random.Generator, scans: Scans, digit: int, size: int, style: int) -> np.ndarray:
    """The digit in one of five other manners of drawing."""
    ground = colour(rng)
    ink = colour(rng, ground, contrast=0.4)
    glyph = scans.glyph(rng, "val", digit, round(size * rng.uniform(0.75, 0.95)))
    rows, columns = np.indices((size, size))
    image = textured(rng, size, size, ground)
    if style == 0:  # outline
        glyph = np.clip(ndimage.grey_dilation(glyph, 3) - ndimage.grey_erosion(glyph, 3), 0, 1)
    elif style == 1:  # halftone dots
        pitch = size / 14
        centred = np.hypot((rows + 0.5) % pitch - pitch / 2, (columns + 0.5) % pitch - pitch / 2)
        dots = np.clip(0.45 * pitch + 0.5 - centred, 0, 1)[: len(glyph), : len(glyph)]
        glyph = glyph * dots
    elif style == 2:  # neon on black
        image *= 0.12
        halo = ndimage.gaussian_filter(glyph, size / 16)
        ink = np.array(colorsys.hsv_to_rgb(rng.random(), 0.6, 1.0))
        glyph = np.clip(0.9 * halo + ndimage.gaussian_filter(glyph, size / 64) ** 2, 0, 1)
    elif style == 3:  # mosaic of tiles of wavering colour
        tile = max(2, size // 16)
        shades = rng.normal(0, 0.09, (size // tile + 1, size // tile + 1, 3))
        small = Image.fromarray(glyph.astype(np.float32)).resize((len(glyph) // tile,) * 2, Image.Resampling.BOX)
        glyph = np.asarray(small.resize(glyph.shape, Image.Resampling.NEAREST), dtype=np.float64) > 0.4
        image += shades[rows // tile, columns // tile]
    else:  # negative: the ground shows through a coloured plate
        glyph = 1 - glyph
    top, left = (int(rng.integers(0, size - len(glyph) + 1)) for _ in range(2))
    lay(image, glyph, top, left, ink)
    if style == 3:
        image += 0.5 * shades[rows // tile, columns // tile]
        image[(rows % tile == 0) | (columns % tile == 0)] *= 0.75
    return image


def drawing(rng: np.random.Generator, scans: Scans, digit: int, size: int) -> np.ndarray:
    """Grey pencil outlines with some hatching on white paper."""
    image = np.full((size, size, 3), rng.uniform(0.93, 1.0)) + rng.normal(0, 0.012, (size, size, 1))
    height = round(size * rng.uniform(0.75, 0.95))
    glyph = scans.glyph(rng, "val", digit, height)
    outline = np.clip(ndimage.grey_dilation(glyph, 3) - glyph, 0, 1)
    rows, columns = np.indices(glyph.shape)
    hatching = 0.45 * ((rows + columns * rng.choice((-1, 1))) % max(3, size // 16) == 0) * (glyph > 0.5)
    pressure = np.clip(0.85 + 0.15 * smooth_noise(rng, height, height, 6), 0.4, 1)
    top, left = (int(rng.integers(0, size - height + 1)) for _ in range(2))
    lay(image, np.maximum(outline, hatching) * pressure, top, left, np.full(3, rng.uniform(0.05, 0.3)))
    return image


def write_imagenet_a(folder: Path, recipe: Recipe, scans: Scans) -> None:
    for i in range(recipe.variants):
        digit = CLASSES_A[i % len(CLASSES_A)]
        image = hard(rng_for(recipe, "imagenet-a", i), scans, digit, recipe.size)
        save(image, folder / str(digit) / f"{i:06d}.jpg")


def write_imagenet_r(folder: Path, recipe: Recipe, scans: Scans) -> None:
    for i in range(recipe.variants):
        digit, style = CLASSES_R[i % len(CLASSES_R)], i // len(CLASSES_R) % 5
        image = rendition(rng_for(recipe, "imagenet-r", i), scans, digit, recipe.size, style)
        save(image, folder / str(digit) / f"{('outline', 'dots', 'neon', 'mosaic', 'negative')[style]}_{i:06d}.jpg")


def write_sketch(folder: Path, recipe: Recipe, scans: Scans) -> None:
    for i in range(recipe.variants):
        save(drawing(rng_for(recipe, "sketch", i), scans, i % 10, recipe.size), folder / str(i % 10) / f"{i:06d}.JPEG")


def write_imagenet_c(folder: Path, recipe: Recipe, scans: Scans) -> None:
    for i in range(recipe.corrupted):
        clean = single(rng_for(recipe, "imagenet-c", i), scans, "val", i % 10, recipe.size)
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                image = apply_corruption(clean, name, severity, rng_for(recipe, "imagenet-c", i, name, severity))
                save(image, folder / name / str(severity) / str(i % 10) / f"val_{i:06d}.JPEG", quality=JPEG_QUALITY)


# ------------------------------------------------------------------------------------------------------------ detection


def filled(mask: np.ndarray) -> np.ndarray:
    """The mask without holes: what cannot be reached from outside belongs to it."""
    outside, _ = ndimage.label(~np.pad(mask, 1))
    return (outside != outside[0, 0])[1:-1, 1:-1]


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run-length code: lengths of runs of 0 and 1 in turn, down the columns, zeros first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO's polygons [x0, y0, x1, y1, ...] along the pixels' edges: one for each part of a mask without holes."""
    parts, _ = ndimage.label(mask)
    found = []
    for part, place in enumerate(ndimage.find_objects(parts), 1):
        padded = np.pad(parts[place] == part, 1)
        above, before = place[0].start - 1, place[1].start - 1
        following = {}  # corner -> next corner, the part on the right hand
        for row, column in np.argwhere(padded & ~ndimage.binary_erosion(padded)).tolist():
            x, y = before + column, above + row
            if not padded[row - 1, column]:
                following[x, y] = x + 1, y
            if not padded[row, column + 1]:
                following[x + 1, y] = x + 1, y + 1
            if not padded[row + 1, column]:
                following[x + 1, y + 1] = x, y + 1
            if not padded[row, column - 1]:
                following[x, y + 1] = x, y
        corners = [min(following)]
        while (corner := following[corners[-1]]) != corners[0]:
            corners.append(corner)
        around = zip(corners[-1:] + corners[:-1], corners, corners[1:] + corners[:1], strict=True)
        turns = [here for last, here, next_ in around if last[0] != next_[0] and last[1] != next_[1]]
        found.append([float(value) for corner in turns for value in corner])
    return found


def scene_size(rng: np.random.Generator, recipe: Recipe) -> tuple[int, int]:
    """(height, width): landscape or portrait, in COCO's proportions."""
    short, long = recipe.scene, round(recipe.scene * rng.choice((1.0, 4 / 3, 1.5)))
    return (short, long) if rng.random() < 0.7 else (long, short)


def places(rng: np.random.Generator, height: int, width: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(top, left, size) for each size that finds a place where it covers little of those before it."""
    taken: list[tuple[int, int, int]] = []
    for size in sizes:
        for _ in range(30):
            top, left = int(rng.integers(0, height - size + 1)), int(rng.integers(0, width - size + 1))
            overlaps = (
                max(0, min(top + size, y + other) - max(top, y)) * max(0, min(left + size, x + other) - max(left, x))
                for y, x, other in taken
            )
            if max(overlaps, default=0) < 0.3 * size**2:
                taken.append((top, left, size))
                yield top, left, size
                break


def coco_scene(
    rng: np.random.Generator, recipe: Recipe, scans: Scans, split: str, number: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray, bool]]]:
    """The picture float[h,w,3] and its things: (digit, bool[h,w] where it is seen, whether it is a crowd).

    As in COCO's polygons, the hole of a nought belongs to it. Every tenth scene holds a crowd of small digits under one
    mask; every twentieth is empty.
    """
    height, width = scene_size(rng, recipe)
    ground = colour(rng)
    image = textured(rng, height, width, ground)
    if number % 20 == 7:
        return image, []
    drawn: list[tuple[int, np.ndarray, bool]] = []
    short = min(height, width)
    if number % 10 == 3:
        digit, ink, small = int(rng.integers(10)), colour(rng, ground), round(short * 0.17)
        crowd = np.zeros((height, width), dtype=bool)
        top, left = int(rng.integers(0, height - 2 * small)), int(rng.integers(0, width - 4 * small))
        for row, column in np.ndindex(2, 4):
            jitter = rng.integers(-2, 3, 2)
            spot = max(0, top + row * small + int(jitter[0])), max(0, left + column * small + int(jitter[1]))
            crowd |= lay(image, scans.glyph(rng, split, digit, small), *spot, ink)
        drawn.append((digit, crowd, True))
    sizes = [round(short * rng.uniform(0.25, 0.6)) for _ in range(rng.integers(1, 6))]
    for top, left, size in places(rng, height, width, sorted(sizes, reverse=True)):
        digit = int(rng.integers(10))
        mask = lay(image, scans.glyph(rng, split, digit, size), top, left, colour(rng, ground))
        drawn.append((digit, filled(mask), False))
    things, above = [], np.zeros((height, width), dtype=bool)
    for digit, mask, is_crowd in reversed(drawn):
        region = mask & ~above
        above |= mask
        if region.sum() >= 12:
            things.append((digit, region, is_crowd))
    return image, things[::-1]


def write_coco(folder: Path, recipe: Recipe, scans: Scans) -> None:
    categories = [{"id": CATEGORY_IDS[digit], "name": str(digit), "supercategory": "digit"} for digit in DIGITS]
    image_ids, thing_ids = itertools.count(1), itertools.count(1)  # no id twice, even over both files
    for split, count in (("train", recipe.coco_train), ("val", recipe.coco_val)):
        images, annotations = [], []
        for i in range(count):
            rng = rng_for(recipe, "coco", split, i)
            image, things = coco_scene(rng, recipe, scans, split, i)
            image_id = next(image_ids)
            name = f"{image_id:012d}.jpg"
            save(image, folder / "images" / name)
            images.append({"id": image_id, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
            for digit, region, is_crowd in things:
                rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
                box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
                coded = is_crowd or rng.random() < recipe.coco_rle
                region = region if coded else filled(region)  # polygons cannot leave out what lies in a nought
                annotations.append(
                    {
                        "id": next(thing_ids),
                        "image_id": image_id,
                        "category_id": CATEGORY_IDS[digit],
                        "iscrowd": int(is_crowd),
                        "area": int(region.sum()),
                        "bbox": [float(edge) for edge in box],
                        "segmentation": run_lengths(region) if coded else polygons(region),
                    }
                )
        content = {
            "info": {"description": "toy scenes of handwritten digits", "version": str(version("coco"))},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------------- segmentation


def ade_scene(rng: np.random.Generator, recipe: Recipe, scans: Scans, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture float[h,w,3] and its class map uint8[h,w]: two grounds that meet at a wavy line, and digits on them.

    `OTHER` are the pixels along the digits' edges and, in every third scene or so, a grey blot that belongs to no
    class.
    """
    height, width = scene_size(rng, recipe)
    names = rng.choice(len(GROUNDS), 2, replace=False)
    hues = [rng.uniform(*list(GROUNDS.values())[name]) for name in names]
    layers = [
        textured(rng, height, width, np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 0.7), rng.uniform(0.45, 0.8))))
        for hue in hues
    ]
    waves = np.sin(np.linspace(0, rng.uniform(2, 8), width) + rng.uniform(0, 6)) * rng.uniform(0.02, 0.06)
    line = height * (rng.uniform(0.35, 0.65) + waves + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, width))
    upper = np.arange(height)[:, None] < line
    image = np.where(upper[..., None], *layers)
    classes = np.where(upper, *(11 + names)).astype(np.uint8)
    short = min(height, width)
    if rng.random() < 0.35:
        rows, columns = np.mgrid[:height, :width]
        centre, radius = rng.uniform(0, 1, 2) * (height, width), rng.uniform(0.08, 0.16, 2) * short
        blot = np.hypot((rows - centre[0]) / radius[0], (columns - centre[1]) / radius[1]) < 1
        image[blot] = textured(rng, height, width, np.full(3, rng.uniform(0.3, 0.6)))[blot]
        classes[blot] = OTHER
    sizes = [round(short * rng.uniform(0.35, 0.7)) for _ in range(rng.integers(1, 5))]
    for top, left, size in places(rng, height, width, sorted(sizes, reverse=True)):
        digit = int(rng.integers(10))
        bright = rng.random() < 0.5  # the grounds are of middle brightness
        ink = np.array(
            colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.5) if bright else 0.8, 1.0 if bright else 0.22)
        )
        mask = lay(image, scans.glyph(rng, split, digit, size), top, left, ink)
        classes[ndimage.binary_dilation(mask)] = OTHER
        classes[mask] = digit + 1
    return image, classes


def write_ade20k(folder: Path, recipe: Recipe, scans: Scans) -> None:
    for split, count, short in (("training", recipe.ade_train, "train"), ("validation", recipe.ade_val, "val")):
        for i in range(count):
            image, classes = ade_scene(rng_for(recipe, "ade20k", split, i), recipe, scans, short)
            stem = f"ADE_{short}_{i + 1:08d}"
            save(image, folder / "images" / split / f"{stem}.jpg")
            (folder / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(classes).save(folder / "annotations" / split / f"{stem}.png")
    named = [*map(str, DIGITS), *GROUNDS]
    table = "".join(f"{number}\t{name}\n" for number, name in enumerate(named, 1))
    (folder / "objectInfo.txt").write_text("Idx\tName\n" + table)


# ------------------------------------------------------------------------------------------------------- contact sheets


def grid(pictures: Sequence[Image.Image], columns: int, titles: Sequence[str] = ()) -> Image.Image:
    """The pictures side by side, each with its title below."""
    width, height = (max(getattr(picture, side) for picture in pictures) + 4 for side in ("width", "height"))
    height += 12 if titles else 0
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * -(-len(pictures) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = i % columns * width + 2, i // columns * height + 2
        sheet.paste(picture, (x, y))
        if titles:
            draw.text((x, y + picture.height), titles[i], "black")
    return sheet


def some(folder: Path, pattern: str, count: int) -> list[Path]:
    """`count` files spread over all that match."""
    paths = sorted(folder.glob(pattern))
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).astype(int))]


def sheet_of_classes(folder: Path) -> Image.Image:
    depth = "val/*/*" if (folder / "val").is_dir() else "*/*"
    paths = some(folder, depth, 40)
    return grid([Image.open(path) for path in paths], 10, [path.parent.name for path in paths])


def sheet_of_corruptions(folder: Path) -> Image.Image:
    chosen = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    paths = []
    for i, (name, severity) in enumerate(chosen):
        found = sorted((folder / name / str(severity)).glob("*/*"))
        paths.append(found[i // 5 * 7 % len(found)])
    return grid([Image.open(path) for path in paths], 10, [f"{name[:8]} {severity}" for name, severity in chosen])


def sheet_of_boxes(folder: Path) -> Image.Image:
    content = json.loads((folder / "annotations" / "instances_val.json").read_text())
    pictures = []
    for entry in content["images"][:20]:
        picture = Image.open(folder / "images" / entry["file_name"]).convert("RGB")
        for thing in (thing for thing in content["annotations"] if thing["image_id"] == entry["id"]):
            area = Image.new("L", picture.size)
            if isinstance(thing["segmentation"], dict):
                counts = thing["segmentation"]["counts"]
                flat = np.repeat(np.arange(len(counts)) % 2, counts).reshape(picture.size)
                area = Image.fromarray(np.uint8(flat.T * 255))
            else:
                for polygon in thing["segmentation"]:
                    ImageDraw.Draw(area).polygon(polygon, fill=255)
            colour = "orange" if thing["iscrowd"] else "cyan" if isinstance(thing["segmentation"], dict) else "red"
            outline = area.filter(ImageFilter.MaxFilter(3))
            outline.paste(0, mask=area)
            picture.paste(Image.new("RGB", picture.size, colour), mask=outline)
            x, y, width, height = thing["bbox"]
            draw = ImageDraw.Draw(picture)
            draw.rectangle((x, y, x + width - 1, y + height - 1), outline="white")
            draw.text((x + 2, y), str(CATEGORY_IDS.index(thing["category_id"])), "white")
        pictures.append(picture)
    return grid(pictures, 5)


def sheet_of_maps(folder: Path) -> Image.Image:
    palette = [0, 0, 0] + [round(255 * c) for i in range(10) for c in colorsys.hsv_to_rgb(i / 10, 1, 1)]
    palette += [135, 190, 235, 90, 160, 60, 225, 205, 150]
    pictures = []
    for path in some(folder, "images/validation/*.jpg", 15):
        classes = Image.open(folder / "annotations" / "validation" / f"{path.stem}.png")
        classes.putpalette(palette)
        pictures += [Image.open(path), classes.convert("RGB")]
    return grid(pictures, 6)


# name -> (writer, contact sheet, the recipe's keys that its content depends on besides the seed)
SETS: dict[SetName, tuple[Callable[[Path, Recipe, Scans], None], Callable[[Path], Image.Image], tuple[str, ...]]] = {
    "imagenet": (write_imagenet, sheet_of_classes, ("size", "imagenet_train", "imagenet_val")),
    "coco": (write_coco, sheet_of_boxes, ("scene", "coco_train", "coco_val", "coco_rle")),
    "ade20k": (write_ade20k, sheet_of_maps, ("scene", "ade_train", "ade_val")),
    "imagenet-a": (write_imagenet_a, sheet_of_classes, ("size", "variants")),
    "imagenet-r": (write_imagenet_r, sheet_of_classes, ("size", "variants")),
    "sketch": (write_sketch, sheet_of_classes, ("size", "variants")),
    "imagenet-c": (write_imagenet_c, sheet_of_corruptions, ("size", "corrupted")),
}
