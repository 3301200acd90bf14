"""Which of a model's logits the classes of a dataset correspond to, and which logits compete on it."""

import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.sources import ImageSource, read_lines
from cls.variants.datasets import DATASETS

log = logging.getLogger("addp")

SUBSET_CLASSES = {"imagenet_a": "imagenet_a_synsets.txt", "imagenet_r": "imagenet_r_synsets.txt"}  # timm's class lists


def logit_names(class_names: tuple[str, ...], classes: int) -> tuple[str, ...]:
    """Return the class name of each logit of a model with this many classes; `class_names` is empty if it has none.

    A model with 1000 classes and without names (or with numbers as names) has the classes of ImageNet, sorted by
    WordNet id.
    """
    numbers = tuple(map(str, range(classes)))
    if class_names and class_names != numbers:
        return class_names
    imagenet = tuple(ImageNetInfo().label_names())
    return imagenet if len(numbers) == len(imagenet) else numbers


def has_class_folders(source: ImageSource) -> bool:
    """Check whether each class of a dataset is the name of a folder or a .tar on the way to its images, and no label
    from a file beside them.
    """
    if source.labels is None:
        return False
    firsts = zip(*np.unique(source.labels, return_index=True), strict=True)
    return all(
        {source.classes[label], f"{source.classes[label]}.tar"} & set(Path(source.name(int(index))).parts)
        for label, index in firsts
        if 0 <= label < len(source.classes)
    )


def named_classes(path: str, class_names: tuple[str, ...], classes: int) -> tuple[str, ...]:
    """Return the names in a file for a model with this many classes.

    Raises UserError if the model has names of its own, or another number of classes.
    """
    if class_names:
        raise UserError(f"classes: the model has class names, such as {class_names[0]!r}; leave the key out")
    names = tuple(line for line in read_lines(Path(path), "classes") if line)
    if len(names) != classes or len(set(names)) != classes:
        raise UserError(
            f"classes: {path} has {len(set(names))} different names, expected {classes}, one for each class"
        )
    return names


def published_classes(key: str) -> list[str]:
    """Return the WordNet ids of the 200 classes of ImageNet-A or -R, as timm lists them; none for other datasets."""
    if key not in SUBSET_CLASSES:
        return []
    return files("timm.data").joinpath("_info", SUBSET_CLASSES[key]).read_text(encoding="ascii").split()


def match_classes(
    key: str,
    location: str,
    classes: Sequence[str],
    names: Sequence[str],
    numbered: bool = False,
    numbers: bool = False,
) -> list[int]:
    """Return the model's logit for each class of a dataset.

    Args:
        key, location: the recipe's key of the dataset and its path, for messages.
        classes: of the dataset, in the order of its labels.
        names: of the model's logits.
        numbered: the dataset's labels are the model's if it has as many, whatever the names of its classes.
        numbers: classes called 0, 1, ... are labels of the model.

    Raises:
        UserError: the dataset has no classes, or classes that the model does not have.
    """
    if not classes:
        raise UserError(f"{key}: {location} has no class folders; expected <class>/<image>, as published")
    logits = {name: logit for logit, name in enumerate(names)}
    unknown = [name for name in classes if name not in logits]
    if not unknown:
        return [logits[name] for name in classes]
    if not numbered and not (numbers and list(classes) == list(map(str, range(len(classes))))):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(
            f"{key}: class {unknown[0]!r}{more} of {location} is not among the model's {len(names)} classes, such as "
            f"{names[0]!r}{did_you_mean(unknown[0], names) or _hint(names)}"
        )
    if numbered and len(classes) != len(names):
        raise UserError(
            f"{key}: {location} has {len(classes)} classes, such as {unknown[0]!r}, and the model has {len(names)} "
            "without it, so that neither names nor labels match; expected class folders with the model's names"
        )
    if len(classes) > len(names):
        raise UserError(
            f"{key}: {location} has label {len(classes) - 1}, expected 0 to {len(names) - 1}, the classes of the model"
        )
    return list(range(len(classes)))


def _hint(names: Sequence[str]) -> str:
    """Return how to name the classes of a model that has only numbers."""
    if list(names) != list(map(str, range(len(names)))):
        return ""
    return (
        "; expected classes=<text file with the model's class names, one per line: the sorted folders of its training>"
    )


def competing_logits(key: str, location: str, classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the logits that predictions are taken from: all, or on ImageNet-A and -R those of the dataset's classes.

    On ImageNet-A and -R, the 200 published classes compete, even if some of them have no images; in a dataset of
    entirely different classes, those that have images.

    Args:
        key, location: the recipe's key of the dataset and its path, for messages.
        classes: those with images, by the model's names.
        names: of the model's logits.

    Raises:
        UserError: some of the classes are published classes of ImageNet-A or -R, and others are not, or there is only
            one, and every prediction would be right.
    """
    if key not in SUBSET_CLASSES:
        return list(range(len(names)))
    published = published_classes(key)
    competing = set(classes)
    if competing & set(published):
        unpublished = sorted(competing - set(published))
        if unpublished:
            raise UserError(
                f"{key}: class {unpublished[0]!r} of {location} is not among the {len(published)} classes of "
                f"{DATASETS[key]}; expected {DATASETS[key]}, or a dataset without any of its classes"
            )
        if len(competing) < len(published):
            log.warning(
                "%s: found images of %d of the %d classes; predictions are taken from all of them",
                key,
                len(competing),
                len(published),
            )
        competing = set(published)
    logits = [logit for logit, name in enumerate(names) if name in competing]
    if len(logits) == 1:
        raise UserError(
            f"{key}: predictions on {location} are taken over its classes, and it has one, {names[logits[0]]!r}; "
            "expected at least two"
        )
    return logits
