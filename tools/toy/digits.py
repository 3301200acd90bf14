"""The digits that all toy datasets share: scikit-learn's scans, and drawing them in color on textured backgrounds.

Images are float[h,w,3] in [0,1] until they are saved.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from addp_core.data.corruptions import smooth_noise

DIGITS = tuple(range(10))


class DigitScans:
    """scikit-learn's 1,797 handwritten digits, split by scan: four fifths of each class for training, the rest for
    validation.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # imported late: slow to load

        digits = load_digits()
        scans = np.pad(digits.images / 16, ((0, 0), (1, 1), (1, 1)))
        order = np.random.default_rng(0).permutation(len(scans))  # not the recipe's seed: the split never changes
        self._pools: dict[tuple[str, int], np.ndarray] = {}
        for digit in DIGITS:
            of_digit = scans[order[digits.target[order] == digit]]
            train_count = len(of_digit) * 4 // 5
            self._pools["train", digit], self._pools["val", digit] = of_digit[:train_count], of_digit[train_count:]

    def pool(self, split: str, digit: int) -> np.ndarray:
        """Return all scans of a digit in a split: float[n,10,10] in [0,1], with a blank border of one pixel."""
        return self._pools[split, digit]

    def glyph(
        self, rng: np.random.Generator, split: str, digit: int, height: int, max_rotation: float = 12
    ) -> np.ndarray:
        """Return a random scan enlarged with crisp edges: float[height,height] in [0,1], rotated by at most
        `max_rotation` degrees.
        """
        pool = self.pool(split, digit)
        scan = Image.fromarray(pool[rng.integers(len(pool))].astype(np.float32))
        large = scan.resize((height, height), Image.Resampling.BICUBIC)
        large = large.rotate(rng.uniform(-max_rotation, max_rotation), Image.Resampling.BICUBIC)
        edge = np.clip((np.asarray(large, dtype=np.float64) - 0.38) / 0.25, 0, 1)
        return edge * edge * (3 - 2 * edge)


def random_color(rng: np.random.Generator, unlike: np.ndarray | None = None, contrast: float = 0.35) -> np.ndarray:
    """Return a random color float[3], not dark grey, its brightness at least `contrast` away from `unlike`'s."""
    while True:
        color = np.array(colorsys.hsv_to_rgb(*rng.uniform((0, 0.2, 0.15), (1, 0.9, 1))))
        if unlike is None or abs((color - unlike) @ (0.3, 0.59, 0.11)) >= contrast:
            return color


def textured(rng: np.random.Generator, height: int, width: int, color: np.ndarray) -> np.ndarray:
    """Return float[h,w,3]: the color with a gradient of light, soft blotches and a little grain."""
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 0.07 * (rows * np.sin(angle) + columns * np.cos(angle)) + 0.03 * smooth_noise(rng, height, width, 4)
    grain = rng.normal(0, 0.015, (height, width, 3))
    return np.clip(color + light[..., None] + grain, 0, 1)


def paste(image: np.ndarray, glyph: np.ndarray, top: int, left: int, ink: np.ndarray) -> np.ndarray:
    """Draw the glyph into `image` in place, clipped at its edges, and return bool[h,w]: the pixels it covers."""
    height, width = image.shape[:2]
    rows = slice(max(0, top), min(height, top + glyph.shape[0]))
    columns = slice(max(0, left), min(width, left + glyph.shape[1]))
    alpha = np.zeros((height, width, 1))
    alpha[rows, columns, 0] = glyph[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    image += alpha * (ink - image)
    return alpha[..., 0] > 0.5


def save_image(image: np.ndarray, path: Path, quality: int = 92) -> None:
    """Write float[h,w,3] in [0,1] as a JPEG without chroma subsampling."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)).save(
        path, "JPEG", quality=quality, subsampling=0
    )


def contact_sheet(images: Sequence[Image.Image], columns: int, titles: Sequence[str] = ()) -> Image.Image:
    """Return the images side by side, each with its title below."""
    width, height = (max(getattr(image, side) for image in images) + 4 for side in ("width", "height"))
    height += 12 if titles else 0
    sheet = Image.new("RGB", (width * min(columns, len(images)), height * -(-len(images) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * width + 2, i // columns * height + 2
        sheet.paste(image, (x, y))
        if titles:
            draw.text((x, y + image.height), titles[i], "black")
    return sheet


def evenly_spread(folder: Path, pattern: str, count: int) -> list[Path]:
    """Return at most `count` files, evenly spread over all that match."""
    paths = sorted(folder.glob(pattern))
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).astype(int))]
