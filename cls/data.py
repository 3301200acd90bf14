"""Labeled images for training and for validation, in which a label means the same class, and their evaluation crop."""

import math
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from addp_core.base.errors import UserError
from addp_core.data.cache import CachedSource
from addp_core.data.config import DataConfig
from addp_core.data.sources import ImageSource, open_source
from addp_core.data.stream import Batch
from addp_core.networks.classifier import Classifier

# The published evaluation crop (App. D.2): this fraction of the shorter side up to 224 px, the whole side above.
CROP_FRACTION, MAX_CROPPED_SIZE = 0.875, 224


def open_splits(config: DataConfig, val: str = "") -> tuple[ImageSource, ImageSource]:
    """Open the training images and the validation images, with the same classes in the same order.

    val: a dataset to validate on; by default the `val` split of the training dataset.

    Raises UserError if the images have fewer than two classes, or if the two splits differ in their classes.
    """
    train = open_source(config)
    if not train.classes:
        raise UserError(f"data.source: {config.source} has no class folders; expected <class>/<image>, or a label list")
    if len(train.classes) == 1:  # every prediction would be right
        raise UserError(
            f"data.source: {config.source} has one class, {train.classes[0]!r}; expected at least two: a folder "
            "<class>/ for each class, or train/<class>/ and val/<class>/"
        )
    val_source = val or config.source
    validation = open_source(replace(config, source=val_source), "val", train.classes)
    if validation.classes != train.classes:  # .tar files and Hugging Face datasets have class names of their own
        pairs = zip_longest(train.classes, validation.classes, fillvalue="none")
        label, (train_class, val_class) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"val: class {label} is {val_class} in {val_source} and {train_class} in {config.source}; "
            "expected the same classes"
        )
    check_labels(train, config.source)
    check_labels(validation, val_source)
    return train, validation


def check_labels(source: ImageSource, name: str) -> None:
    """Check the labels of a whole dataset, if they are known without reading its images.

    name: of the dataset, for messages.

    Raises UserError if a label is out of range or a class has no images.
    """
    if source.labels is None:
        return
    for label in (source.labels.min(), source.labels.max()):
        if not 0 <= label < len(source.classes):
            raise UserError(f"{name}: found label {label}, expected 0 to {len(source.classes) - 1}")
    counts = np.bincount(source.labels, minlength=len(source.classes))
    empty = [class_name for class_name, count in zip(source.classes, counts, strict=True) if not count]
    if empty:
        listed = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise UserError(
            f"{name}: {len(empty)} of the {len(source.classes)} classes have no images: {listed}; "
            "expected images of every class in training and in validation"
        )


def check_batch_labels(batch: Batch, classes: int) -> None:
    """Check the labels of one batch, for datasets whose labels are known only once their images are read.

    Raises UserError if a label is out of range.
    """
    invalid = batch.labels[(batch.labels < 0) | (batch.labels >= classes)]
    if len(invalid):
        raise UserError(f"data.source: found label {int(invalid[0])}, expected 0 to {classes - 1}")


def evaluation_crop(size: tuple[int, int], fraction: float | None) -> float:
    """Return the fraction of the shorter side to crop in evaluation: `fraction`, or the published one for this size."""
    return fraction if fraction is not None else CROP_FRACTION if max(size) <= MAX_CROPPED_SIZE else 1.0


def classifier_crop(model: Classifier, fraction: float | None = None) -> float:
    """Return the fraction to crop for a classifier: `fraction`, else that of its validation, else the published one."""
    return evaluation_crop(model.encoder.image_size, model.crop if fraction is None else fraction)


def cache_for_evaluation(source: ImageSource, config: DataConfig, fraction: float) -> ImageSource:
    """Keep the images in memory if `data.cache` is `ram`, at the resolution that a crop of this fraction needs."""
    if config.cache != "ram":
        return source
    return CachedSource(source, math.ceil(max(config.hw) / fraction), config.cache_gb)
