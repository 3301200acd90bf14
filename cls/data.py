"""Labelled images for training and for validation, under the same labels."""

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

SHARE_224, LARGE = 0.875, 224  # evaluation crops this share of the shorter side, up to this size (App. D.2)


def open_splits(config: DataConfig, val: str = "") -> tuple[ImageSource, ImageSource]:
    """The images to train on, and those of the set's `val` split or of the set `val`; a label means the same in both.

    UserError where images have no classes, or where a class of the one is missing in the other.
    """
    train = open_source(config)
    if not train.classes:
        raise UserError(f"data.source: {config.source} has no class folders; expected <class>/<image>, or labels")
    test = open_source(replace(config, source=val or config.source), "val", train.classes)
    where = val or config.source
    if test.classes != train.classes:  # shards and hub sets bring names of their own
        pairs = zip_longest(train.classes, test.classes, fillvalue="none")
        label, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"val: class {label} of {where} is {theirs}, that of {config.source} {ours}; expected the same classes"
        )
    check_labels(train, config.source)
    check_labels(test, where)
    return train, test


def check_labels(source: ImageSource, where: str) -> None:
    """UserError where a label lies outside the classes, or a class has no image; of sets that tell labels at once."""
    if source.labels is None:
        return
    for label in (source.labels.min(), source.labels.max()):
        if not 0 <= label < len(source.classes):
            raise UserError(f"{where}: found label {label}, expected 0 to {len(source.classes) - 1}")
    counts = np.bincount(source.labels, minlength=len(source.classes))
    missing = [name for name, count in zip(source.classes, counts, strict=True) if not count]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"{where}: no image of {len(missing)} of the {len(source.classes)} classes: {shown}; "
            "expected every class in training and in validation"
        )


def check_batch(batch: Batch, classes: int) -> None:
    """UserError where a label of the batch lies outside the classes; for sets that do not tell labels at once."""
    strays = batch.labels[(batch.labels < 0) | (batch.labels >= classes)]
    if len(strays):
        raise UserError(f"data.source: found label {int(strays[0])}, expected 0 to {classes - 1}")


def evaluation_share(size: tuple[int, int], share: float | None) -> float:
    """The share of the shorter side that evaluation crops: as given, or the published rule."""
    return share if share is not None else SHARE_224 if max(size) <= LARGE else 1.0


def share_of(model: Classifier, share: float | None = None) -> float:
    """The same for a classifier: as given, or as it was validated, or the published rule for its size."""
    return evaluation_share(model.encoder.image_size, model.crop if share is None else share)


def held(source: ImageSource, config: DataConfig, share: float) -> ImageSource:
    """The source in memory where `data.cache` says so, with the pixels that an evaluation crop of this share needs."""
    if config.cache != "ram":
        return source
    return CachedSource(source, math.ceil(max(config.hw) / share), config.cache_gb)
