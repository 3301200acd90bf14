"""A labeled dataset and a checkpoint small enough for tests of transfers, and settings without augmentation."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import tiny_addp

from addp_core import save_model

RGB = tuple[int, int, int]
COLORS: dict[str, RGB] = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}
NO_AUGMENTATION = {"augment.auto": "", "augment.erase": 0, "augment.mixup": 0, "augment.cutmix": 0}


def write_color_images(
    root: Path,
    colors: Mapping[str, RGB] = COLORS,
    hw: tuple[int, int] = (12, 12),
    noise: float = 30,
    train: int = 16,
    val: int = 6,
) -> None:
    """Write train/<color> and val/<color> below `root`: that many noisy images of each color, of `hw` pixels."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for name, color in colors.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(rng.normal(color, noise, (*hw, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write an ADDP model for images of 8 x 8 pixels, and return its path."""
    path = folder / "model.safetensors"
    save_model(tiny_addp(image_size=(8, 8)), path)
    return path
