"""A labeled dataset and a checkpoint small enough for tests of transfers, and settings without augmentation."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import TOKENIZER, tiny_addp

from addp_core import save_model
from addp_core.networks.predictor import PredictorConfig, TokenPredictor
from addp_core.networks.tokenizer import Tokenizer, Vocabulary
from addp_core.weights.fingerprint import fingerprint

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


def write_tiny_mage(folder: Path, depth: int = 2, stride: int = 4, side: int = 12) -> tuple[Path, Path]:
    """Write a run of `addp predictor` and the tokenizer that its recipe names.

    Returns the run's folder and the tokenizer's file, for images of `side` x `side` tokens of `stride` pixels.
    """
    torch.manual_seed(0)
    config = replace(TOKENIZER, multipliers=(1,) * stride.bit_length())
    tokenizer = Tokenizer(config, (side, side)).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    predictor = TokenPredictor(PredictorConfig(32, depth, 2, 1, 2), side * side, Vocabulary(config.codebook, 5, 1))
    predictor.trained_on = fingerprint(tokenizer)
    run = folder / "mage"
    run.mkdir()
    save_model(predictor, run / "model.safetensors", grid=(side, side))
    save_model(tokenizer, folder / "tokenizer.safetensors")
    (run / "recipe.yaml").write_text(f"tokenizer: {folder / 'tokenizer.safetensors'}\n")
    return run, folder / "tokenizer.safetensors"
