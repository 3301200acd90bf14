"""Images that are held out of training, a share of the labeled ones, and checks of the labels of a whole dataset."""

import hashlib
import logging
import os
from collections.abc import Iterator

import numpy as np

from addp_core.base.errors import UserError
from addp_core.data.image_source import ImageSource, Subset

log = logging.getLogger("addp")


def hold_out(
    source: ImageSource,
    share: float,
    seed: int,
    key: str = "val_share",
    instead: str = "val",
    every_class: bool = True,
) -> tuple[ImageSource, ImageSource]:
    """Split a dataset into images to train on and images to validate on.

    Of each class, the share (at least one image) whose digests of the seed and the image's name are lowest is held out:
    the same images wherever the dataset lies, and nearly the same ones after images were added or removed. Images
    without classes count as one class.

    Args:
        source: the dataset.
        share: of the images to hold out.
        seed: of their choice.
        key: of the recipe that holds the share.
        instead: the key that names other images to validate on.
        every_class: whether every class must have images in both parts; otherwise a class of one image is trained on.

    Raises UserError if a class that must be divided has fewer than two images, or none can be divided, or the labels
    are not known without reading the images.
    """
    if source.classes and source.labels is None:
        raise UserError(f"{key}: found {share}, but the labels are not known in advance; expected {instead}=<images>")
    held_out = np.zeros(len(source), dtype=bool)
    for class_name, indices in _shuffled_classes(source, seed):
        if len(indices) < 2 and not every_class:
            continue
        if len(indices) < 2:
            raise UserError(
                f"{key}: class {class_name!r} has {len(indices)} image; expected at least two, one to validate on"
            )
        held_out[indices[: min(max(1, round(share * len(indices))), len(indices) - 1)]] = True
    if not held_out.any():
        raise UserError(f"{key}: found {share}, but no class has two images, one of which could be held out")
    log.info(
        "data: %d of %d images are held out for validation (%s=%s, seed %d)",
        *(held_out.sum(), len(source), key, share, seed),
    )
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))


def keep_share(source: ImageSource, share: float, seed: int, key: str) -> ImageSource:
    """Return this share of the images of each class, at least one; all of them, unchanged, if it is 1.

    Which images are kept depends on the seed and their names, as in `hold_out`; with one seed, those of a smaller share
    are among those of a larger one.

    Args:
        source: the dataset, with classes.
        share: of the images of each class to keep, above 0 and at most 1.
        seed: of their choice.
        key: of the recipe that holds the share.

    Raises UserError if the labels are not known without reading the images.
    """
    if share == 1:
        return source
    if source.labels is None:
        raise UserError(
            f"{key}: found {share}, but the labels are not known in advance; expected 1, or images in class folders"
        )
    kept = [indices[: max(1, round(share * len(indices)))] for _, indices in _shuffled_classes(source, seed)]
    chosen = np.sort(np.concatenate(kept))
    log.info("data: %d of %d images are trained on (%s=%s, seed %d)", len(chosen), len(source), key, share, seed)
    return Subset(source, chosen)


def _shuffled_classes(source: ImageSource, seed: int) -> Iterator[tuple[str, list[int]]]:
    """Yield each class and its images, in the order of the digests of the seed and their names.

    Images without classes count as one class.
    """
    labels = source.labels if source.classes else None
    labels = np.zeros(len(source), dtype=np.int64) if labels is None else labels
    keys = [hashlib.blake2b(name, key=str(seed).encode(), digest_size=8).digest() for name in source.relative_names()]
    classes = source.classes or ("all images",)
    by_label = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_label], np.arange(len(classes) + 1))
    for label, class_name in enumerate(classes):
        yield class_name, sorted(by_label[starts[label] : starts[label + 1]].tolist(), key=keys.__getitem__)


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


def same_images(first: ImageSource, second: ImageSource) -> bool:
    """Check whether two datasets are the same files, by their number and the paths of three of them."""
    return len(first) == len(second) and all(
        os.path.realpath(first.name(index)) == os.path.realpath(second.name(index))
        for index in (0, len(first) // 2, len(first) - 1)
    )
