"""Commands of `addp evaluate` in tests, the images that they compare, and what they leave."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

HW = (24, 32)


def write_images(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def photographs(n: int, seed: int) -> list[np.ndarray]:
    """Return random smooth images."""
    rng = np.random.default_rng(seed)
    small = (Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)) for _ in range(n))
    return [np.array(image.resize(HW[::-1], Image.Resampling.BICUBIC)) for image in small]


def noise(n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, *HW, 3), dtype=np.uint8))


def evaluate_command(inputs: Path, out: Path, *settings: str) -> list[str]:
    """Return the arguments of an evaluation with the classifier, which is fast; a key set to "-" is left out."""
    keys: dict[str, object] = {
        "reference": inputs / "b",
        "extractor": inputs / "classifier.safetensors",
        "cache": out.parent / "cache",
    }
    keys |= {"out": out, "is_splits": 2, "workers": 0}
    keys |= dict(setting.split("=", 1) for setting in settings)
    return ["evaluate", *(f"{key}={value}" for key, value in keys.items() if value != "-")]


def report_rows(out: Path) -> list[dict]:
    return json.loads((out / "evaluation.json").read_text())["rows"]
