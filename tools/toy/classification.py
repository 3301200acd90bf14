"""The classification datasets of `addp toy`: ImageNet's folders, and the variants -A, -R, -Sketch and -C."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from addp_core.data.corruptions import CORRUPTIONS, JPEG_QUALITY, SEVERITIES, apply_corruption, smooth_noise
from tools.toy.digits import DigitScans, contact_sheet, evenly_spread, paste, random_color, save_image, textured
from tools.toy.recipe import Recipe, rng_for

# As in the real datasets, some of the classes only, and not the same ones.
CLASSES_A = (0, 2, 3, 5, 7, 8)
CLASSES_R = (0, 1, 3, 4, 6, 9)
STYLES = ("outline", "dots", "neon", "mosaic", "negative")  # of imagenet-r


def draw_single_digit(rng: np.random.Generator, scans: DigitScans, split: str, digit: int, size: int) -> np.ndarray:
    """Return float[size,size,3]: one large digit on a textured background."""
    background = random_color(rng)
    image = textured(rng, size, size, background)
    height = round(size * rng.uniform(0.7, 1.0))
    top, left = (round(rng.uniform(-0.04, 1.04) * (size - height)) for _ in range(2))
    paste(image, scans.glyph(rng, split, digit, height), top, left, random_color(rng, background))
    return image


def write_imagenet(folder: Path, recipe: Recipe, scans: DigitScans) -> None:
    """Write train/<class>/*.JPEG and val/<class>/*.JPEG."""
    for split, count in (("train", recipe.imagenet_train), ("val", recipe.imagenet_val)):
        for i in range(count):
            image = draw_single_digit(rng_for(recipe, "imagenet", split, i), scans, split, i % 10, recipe.size)
            save_image(image, folder / split / str(i % 10) / f"{split}_{i:06d}.JPEG")


# -------------------- imagenet-a


def draw_hard_digit(rng: np.random.Generator, scans: DigitScans, digit: int, size: int) -> np.ndarray:
    """Return float[size,size,3]: an image that a classifier trained on single digits gets wrong more often."""
    background = random_color(rng)
    image = textured(rng, size, size, background)
    for _ in range(rng.integers(1, 4)):  # clutter: faint strokes of other digits
        other = scans.glyph(rng, "val", int(rng.integers(10)), round(size * rng.uniform(0.3, 0.6)), max_rotation=180)
        top, left = rng.integers(-size // 4, size, 2)
        paste(image, 0.6 * other, int(top), int(left), random_color(rng))
    height = round(size * rng.uniform(0.45, 0.75))
    top, left = (int(rng.integers(0, size - height + 1)) for _ in range(2))
    glyph = scans.glyph(rng, "val", digit, height, max_rotation=40)
    paste(image, glyph, top, left, random_color(rng, background, contrast=0.2))
    if rng.random() < 0.4:  # a bar in front of the digit
        bar = int(rng.integers(0, size - size // 8))
        band = np.index_exp[bar : bar + size // 10] if rng.random() < 0.5 else np.index_exp[:, bar : bar + size // 10]
        image[band] = random_color(rng)
    return image


def write_imagenet_a(folder: Path, recipe: Recipe, scans: DigitScans) -> None:
    """Write <class>/*.jpg of six classes: rotated, small, faint, cluttered or partly covered digits."""
    for i in range(recipe.variants):
        digit = CLASSES_A[i % len(CLASSES_A)]
        image = draw_hard_digit(rng_for(recipe, "imagenet-a", i), scans, digit, recipe.size)
        save_image(image, folder / str(digit) / f"{i:06d}.jpg")


# -------------------- imagenet-r


def draw_rendition(rng: np.random.Generator, scans: DigitScans, digit: int, size: int, style: str) -> np.ndarray:
    """Return float[size,size,3]: the digit in one of the `STYLES`."""
    background = random_color(rng)
    ink = random_color(rng, background, contrast=0.4)
    glyph = scans.glyph(rng, "val", digit, round(size * rng.uniform(0.75, 0.95)))
    rows, columns = np.indices((size, size))
    image = textured(rng, size, size, background)
    if style == "outline":
        glyph = np.clip(ndimage.grey_dilation(glyph, 3) - ndimage.grey_erosion(glyph, 3), 0, 1)
    elif style == "dots":  # halftone
        pitch = size / 14
        to_center = np.hypot((rows + 0.5) % pitch - pitch / 2, (columns + 0.5) % pitch - pitch / 2)
        dots = np.clip(0.45 * pitch + 0.5 - to_center, 0, 1)[: len(glyph), : len(glyph)]
        glyph = glyph * dots
    elif style == "neon":  # on black
        image *= 0.12
        halo = ndimage.gaussian_filter(glyph, size / 16)
        ink = np.array(colorsys.hsv_to_rgb(rng.random(), 0.6, 1.0))
        glyph = np.clip(0.9 * halo + ndimage.gaussian_filter(glyph, size / 64) ** 2, 0, 1)
    elif style == "mosaic":  # tiles of varying color
        tile = max(2, size // 16)
        shades = rng.normal(0, 0.09, (size // tile + 1, size // tile + 1, 3))
        small = Image.fromarray(glyph.astype(np.float32)).resize((len(glyph) // tile,) * 2, Image.Resampling.BOX)
        resized = small.resize((len(glyph), len(glyph)), Image.Resampling.NEAREST)
        glyph = np.asarray(resized, dtype=np.float64) > 0.4
        image += shades[rows // tile, columns // tile]
    else:  # negative: the background shows through a colored plate
        glyph = 1 - glyph
    top, left = (int(rng.integers(0, size - len(glyph) + 1)) for _ in range(2))
    paste(image, glyph, top, left, ink)
    if style == "mosaic":
        image += 0.5 * shades[rows // tile, columns // tile]
        image[(rows % tile == 0) | (columns % tile == 0)] *= 0.75
    return image


def write_imagenet_r(folder: Path, recipe: Recipe, scans: DigitScans) -> None:
    """Write <class>/<style>_*.jpg of six classes."""
    for i in range(recipe.variants):
        digit, style = CLASSES_R[i % len(CLASSES_R)], STYLES[i // len(CLASSES_R) % len(STYLES)]
        image = draw_rendition(rng_for(recipe, "imagenet-r", i), scans, digit, recipe.size, style)
        save_image(image, folder / str(digit) / f"{style}_{i:06d}.jpg")


# -------------------- sketch


def draw_sketch(rng: np.random.Generator, scans: DigitScans, digit: int, size: int) -> np.ndarray:
    """Return float[size,size,3]: grey pencil outlines with some hatching on white paper."""
    image = np.full((size, size, 3), rng.uniform(0.93, 1.0)) + rng.normal(0, 0.012, (size, size, 1))
    height = round(size * rng.uniform(0.75, 0.95))
    glyph = scans.glyph(rng, "val", digit, height)
    outline = np.clip(ndimage.grey_dilation(glyph, 3) - glyph, 0, 1)
    rows, columns = np.indices(glyph.shape)
    hatching = 0.45 * ((rows + columns * rng.choice((-1, 1))) % max(3, size // 16) == 0) * (glyph > 0.5)
    pressure = np.clip(0.85 + 0.15 * smooth_noise(rng, height, height, 6), 0.4, 1)
    top, left = (int(rng.integers(0, size - height + 1)) for _ in range(2))
    paste(image, np.maximum(outline, hatching) * pressure, top, left, np.full(3, rng.uniform(0.05, 0.3)))
    return image


def write_sketch(folder: Path, recipe: Recipe, scans: DigitScans) -> None:
    """Write <class>/*.JPEG of all classes."""
    for i in range(recipe.variants):
        image = draw_sketch(rng_for(recipe, "sketch", i), scans, i % 10, recipe.size)
        save_image(image, folder / str(i % 10) / f"{i:06d}.JPEG")


# -------------------- imagenet-c


def write_imagenet_c(folder: Path, recipe: Recipe, scans: DigitScans) -> None:
    """Write <corruption>/<severity>/<class>/*.JPEG: the same images under 15 corruptions of 5 severities."""
    for i in range(recipe.corrupted):
        clean = draw_single_digit(rng_for(recipe, "imagenet-c", i), scans, "val", i % 10, recipe.size)
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                image = apply_corruption(clean, name, severity, rng_for(recipe, "imagenet-c", i, name, severity))
                save_image(image, folder / name / str(severity) / str(i % 10) / f"val_{i:06d}.JPEG", JPEG_QUALITY)


# -------------------- contact sheets


def class_sheet(folder: Path) -> Image.Image:
    """Return images of all classes with the class names."""
    pattern = "val/*/*" if (folder / "val").is_dir() else "*/*"
    paths = evenly_spread(folder, pattern, 40)
    return contact_sheet([Image.open(path) for path in paths], 10, [path.parent.name for path in paths])


def corruption_sheet(folder: Path) -> Image.Image:
    """Return one image of each corruption and severity."""
    pairs = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    paths = []
    for i, (name, severity) in enumerate(pairs):
        candidates = sorted((folder / name / str(severity)).glob("*/*"))
        paths.append(candidates[i // 5 * 7 % len(candidates)])
    titles = [f"{name[:8]} {severity}" for name, severity in pairs]
    return contact_sheet([Image.open(path) for path in paths], 10, titles)
