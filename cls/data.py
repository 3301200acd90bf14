"""Labeled images for training and for validation, in which a label means the same class, and their evaluation crop."""

import logging
import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest

from addp_core.base.errors import UserError
from addp_core.data.cache import CachedSource
from addp_core.data.config import DataConfig
from addp_core.data.held_out import check_labels, hold_out, keep_share, same_images
from addp_core.data.image_source import ImageSource
from addp_core.data.sources import explain_missing_classes, open_source
from addp_core.data.splits import MissingSplitError
from addp_core.data.stream import Batch, Stream
from addp_core.networks.classifier import Classifier
from cls.recipe import EvaluationCrop as EvaluationCrop

log = logging.getLogger("addp")

HOLD_OUT_HINT = "val_share=0.1 to hold out a tenth of the training images of each class"
# The published evaluation crop (App. D.2): this fraction of the shorter side up to 224 px, the whole side above.
CROP_FRACTION, MAX_CROPPED_SIZE = 0.875, 224


def open_splits(
    config: DataConfig, val: str = "", val_share: float = 0.0, seed: int = 0, label_share: float = 1.0
) -> tuple[ImageSource, ImageSource]:
    """Open the training images and the validation images, with the same classes in the same order.

    Args:
        config: the training images.
        val: a dataset to validate on; by default the `val` split of the training dataset.
        val_share: the share of the training images of each class to validate on instead.
        seed: of the choice of these images, and of those to train on.
        label_share: the share of the training images of each class to train on.

    Raises UserError if the images have fewer than two classes, if the two splits differ in their classes, or if there
    are no images to validate on but those of training.
    """
    if val and val_share:
        raise UserError(f"val_share: found {val_share} beside val={val}; expected one of the two")
    train = open_source(config)
    if not train.classes:
        raise UserError(f"data.source: {explain_missing_classes(train, config.source)}")
    if len(train.classes) == 1:  # every prediction would be right
        raise UserError(
            f"data.source: {config.source} has one class, {train.classes[0]!r}; expected at least two: a folder "
            "<class>/ for each class, or train/<class>/ and val/<class>/"
        )
    check_labels(train, config.source)
    if val_share:
        train, validation = hold_out(train, val_share, seed)
        return keep_share(train, label_share, seed, "label_share"), validation
    val_source = val or config.source
    try:
        validation = open_source(replace(config, source=val_source), "val", train.classes)
    except MissingSplitError as error:
        raise UserError(f"{error}; expected val=<images to validate on>, or {HOLD_OUT_HINT}") from error
    if not validation.classes:
        raise UserError(f"val: the validation split of {explain_missing_classes(validation, val_source)}")
    if validation.classes != train.classes:  # Hugging Face datasets have class names of their own
        pairs = zip_longest(train.classes, validation.classes, fillvalue="none")
        label, (train_class, val_class) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"val: class {label} is {val_class} in {val_source} and {train_class} in {config.source}; "
            "expected the same classes"
        )
    if same_images(train, validation):
        if not val:
            raise UserError(
                f"val: {config.source} has no split to validate on, only the training images; expected "
                f"val=<other images>, or {HOLD_OUT_HINT}"
            )
        log.warning("val: %s has the training images: its metrics say nothing about other images", val)
    check_labels(validation, val_source)
    return keep_share(train, label_share, seed, "label_share"), validation


class LabeledStream(Stream):
    """A stream whose labels are those of its source's classes, also if they are known only once an image is read."""

    def batches(self, start: int = 0, rank: int = 0, world: int = 1) -> Generator[Batch, None, None]:
        """Yield batches as `Stream` does. Raises UserError if a label is out of range."""
        classes = len(self.source.classes)
        with closing(super().batches(start, rank, world)) as batches:
            for batch in batches:
                # here rather than in the step, where the host would have to wait for the GPU
                invalid = batch.labels[(batch.labels < 0) | (batch.labels >= classes)]
                if len(invalid):
                    raise UserError(f"data.source: found label {int(invalid[0])}, expected 0 to {classes - 1}")
                yield batch


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
