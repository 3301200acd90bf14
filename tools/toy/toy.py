"""`addp toy out=DIR`: small datasets in the real formats, for trying every task in minutes without a download.

The objects are the 1,797 handwritten digits that scikit-learn ships (8 x 8 scans), enlarged, colored and pasted on
colored backgrounds. A scan is used either for training or for validation. Every image is a function of the seed, its
dataset and its number.

    imagenet/         train/<class>/*.JPEG, val/<class>/*.JPEG; classes "0" to "9"
    coco/             {train,val}2017/*.jpg, annotations/instances_{train,val}2017.json; polygons, some run-length
                      masks and crowds; category ids 1-5 and 7-11, with a gap as in COCO
    ade20k/           images/{training,validation}/*.jpg, annotations/.../*.png: 0 other, 1-10 digits, 11-13
                      backgrounds; objectInfo.txt names them
    imagenet-a/       hard images of six classes: rotated, small, faint, cluttered, partly covered
    imagenet-r/       six classes in other renditions: outlines, halftone dots, neon, mosaic, negative
    sketch/           all classes as pencil drawings
    imagenet-c/       <corruption>/<severity>/<class>/*.JPEG: the same validation images under 15 x 5 corruptions
    contact/          a contact sheet of each dataset
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home
from tools.toy import ade20k, classification, coco
from tools.toy.digits import DigitScans
from tools.toy.recipe import DatasetName, Recipe

log = logging.getLogger("addp")


@dataclass(frozen=True)
class ToyDataset:
    """How a dataset is written and shown, and what its files depend on besides the seed."""

    write: Callable[[Path, Recipe, DigitScans], None]
    contact_sheet: Callable[[Path], Image.Image]
    keys: tuple[str, ...]  # of the recipe
    version: int = 1  # of the images and files: a folder of another version is refused, not mixed


DATASETS: dict[DatasetName, ToyDataset] = {
    "imagenet": ToyDataset(
        classification.write_imagenet, classification.class_sheet, ("size", "imagenet_train", "imagenet_val")
    ),
    "coco": ToyDataset(
        coco.write_coco,
        coco.box_sheet,
        ("scene", "coco_train", "coco_val", "coco_rle", "coco_names"),
        coco.FORMAT_VERSION,
    ),
    "ade20k": ToyDataset(ade20k.write_ade20k, ade20k.class_map_sheet, ("scene", "ade_train", "ade_val")),
    "imagenet-a": ToyDataset(classification.write_imagenet_a, classification.class_sheet, ("size", "variants")),
    "imagenet-r": ToyDataset(classification.write_imagenet_r, classification.class_sheet, ("size", "variants")),
    "sketch": ToyDataset(classification.write_sketch, classification.class_sheet, ("size", "variants")),
    "imagenet-c": ToyDataset(
        classification.write_imagenet_c, classification.corruption_sheet, ("size", "corrupted"), version=2
    ),
}


def run(recipe: Recipe) -> None:
    """Make the datasets that are missing.

    A dataset appears under its name once it is complete. Raises UserError if a folder was made with other settings or
    cannot be written.
    """
    out = expand_home(recipe.out)
    scans = DigitScans()
    try:
        for name in recipe.only or DATASETS:
            make_dataset(name, recipe, scans, out)
    except OSError as error:
        raise UserError(f"out: {error.filename or out} cannot be written: {error.strerror or error}") from error


def make_dataset(name: DatasetName, recipe: Recipe, scans: DigitScans, out: Path) -> None:
    """Write one dataset under a temporary name, then its contact sheet, then rename it."""
    dataset = DATASETS[name]
    settings = {"set": name, "version": dataset.version, "seed": recipe.seed}
    settings |= {key: getattr(recipe, key) for key in dataset.keys}
    folder, partial = out / name, out / f".tmp-{name}"
    if folder.exists():
        check_same_settings(folder, settings)
        log.info("toy: %s exists already", folder)
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dataset.write(partial, recipe, scans)
    (out / "contact").mkdir(exist_ok=True)
    partial_sheet = out / "contact" / f".tmp-{name}.png"
    dataset.contact_sheet(partial).save(partial_sheet)
    os.replace(partial_sheet, out / "contact" / f"{name}.png")
    (partial / "toy.json").write_text(json.dumps(settings, indent=1) + "\n")
    os.rename(partial, folder)
    log.info("toy: wrote %s", folder)


def check_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError unless the dataset in this folder was made with these settings."""
    try:
        found = json.loads((folder / "toy.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"out: {folder} exists and was not made by addp toy; choose another folder") from error
    found = {"coco_names": False, **found}  # the one key that sets of older versions lack
    for key, value in settings.items():
        if found.get(key) != value:
            raise UserError(
                f"{key}: {value}, but {folder} was made with {key}={found.get(key)}; "
                "choose another out= or remove that folder"
            )
