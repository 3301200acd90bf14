"""The segmentation dataset of `addp toy` in ADE20K's format: two backgrounds and digits on them, with class maps."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from tools.toy.digits import DIGITS, DigitScans, contact_sheet, evenly_spread, paste, save_image, textured
from tools.toy.recipe import Recipe, rng_for
from tools.toy.scenes import place_squares, scene_size

BACKGROUNDS = {"sky": (0.53, 0.62), "grass": (0.25, 0.38), "sand": (0.08, 0.14)}  # name: range of hues
OTHER = 0  # class of the pixels that belong to no class


def draw_scene(
    rng: np.random.Generator, recipe: Recipe, scans: DigitScans, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image float[h,w,3] and its class map uint8[h,w]: two backgrounds that meet at a wavy line, and digits.

    `OTHER` are the pixels along the digits' edges and, in about every third scene, a grey blot that belongs to no
    class.
    """
    height, width = scene_size(rng, recipe)
    names = rng.choice(len(BACKGROUNDS), 2, replace=False)
    hues = [rng.uniform(*list(BACKGROUNDS.values())[name]) for name in names]
    layers = [
        textured(rng, height, width, np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 0.7), rng.uniform(0.45, 0.8))))
        for hue in hues
    ]
    waves = np.sin(np.linspace(0, rng.uniform(2, 8), width) + rng.uniform(0, 6)) * rng.uniform(0.02, 0.06)
    line = height * (rng.uniform(0.35, 0.65) + waves + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, width))
    upper = np.arange(height)[:, None] < line
    image = np.where(upper[..., None], layers[0], layers[1])
    first, second = (1 + len(DIGITS) + int(name) for name in names)
    classes = np.where(upper, first, second).astype(np.uint8)
    short = min(height, width)
    if rng.random() < 0.35:
        rows, columns = np.mgrid[:height, :width]
        center, radius = rng.uniform(0, 1, 2) * (height, width), rng.uniform(0.08, 0.16, 2) * short
        blot = np.hypot((rows - center[0]) / radius[0], (columns - center[1]) / radius[1]) < 1
        image[blot] = textured(rng, height, width, np.full(3, rng.uniform(0.3, 0.6)))[blot]
        classes[blot] = OTHER
    sizes = [round(short * rng.uniform(0.35, 0.7)) for _ in range(rng.integers(1, 5))]
    for top, left, size in place_squares(rng, height, width, sorted(sizes, reverse=True)):
        digit = int(rng.integers(10))
        bright = rng.random() < 0.5  # the backgrounds are of medium brightness
        ink = np.array(
            colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.5) if bright else 0.8, 1.0 if bright else 0.22)
        )
        mask = paste(image, scans.glyph(rng, split, digit, size), top, left, ink)
        classes[ndimage.binary_dilation(mask)] = OTHER
        classes[mask] = digit + 1
    return image, classes


def write_ade20k(folder: Path, recipe: Recipe, scans: DigitScans) -> None:
    """Write images/ and annotations/ for training and validation, and objectInfo.txt with the class names."""
    for split, count, short_name in (
        ("training", recipe.ade_train, "train"),
        ("validation", recipe.ade_val, "val"),
    ):
        for i in range(count):
            image, classes = draw_scene(rng_for(recipe, "ade20k", split, i), recipe, scans, short_name)
            stem = f"ADE_{short_name}_{i + 1:08d}"
            save_image(image, folder / "images" / split / f"{stem}.jpg")
            (folder / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(classes).save(folder / "annotations" / split / f"{stem}.png")
    class_names = [*map(str, DIGITS), *BACKGROUNDS]
    table = "".join(f"{number}\t{name}\n" for number, name in enumerate(class_names, 1))
    (folder / "objectInfo.txt").write_text("Idx\tName\n" + table)


def class_map_sheet(folder: Path) -> Image.Image:
    """Return validation scenes beside their class maps in color."""
    palette = [0, 0, 0] + [round(255 * c) for i in range(10) for c in colorsys.hsv_to_rgb(i / 10, 1, 1)]
    palette += [135, 190, 235, 90, 160, 60, 225, 205, 150]
    images = []
    for path in evenly_spread(folder, "images/validation/*.jpg", 15):
        classes = Image.open(folder / "annotations" / "validation" / f"{path.stem}.png")
        classes.putpalette(palette)
        images += [Image.open(path), classes.convert("RGB")]
    return contact_sheet(images, 6)
