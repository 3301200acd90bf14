"""Which part of a dataset is its training, validation and test split: by the names of folders and of tar shards."""

import logging
import os
import re
from collections.abc import Sequence
from typing import Protocol

from addp_core.base.errors import UserError

log = logging.getLogger("addp")

# For each split, the names of its folder, in any case; of several, the first is taken.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
SPLIT_OF_NAME = {name: split for split, names in SPLIT_NAMES.items() for name in names}
# Kaggle's ImageNet lies in the first of these folders of the unpacked archive, or may be given by a folder below.
KAGGLE_IMAGENET = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")


class MissingSplitError(UserError):
    """A dataset has splits, but not the one asked for."""


class Tree(Protocol):
    """The folders of a dataset: on the disk, or in a tar."""

    def folders(self, path: str = "") -> list[str]: ...

    def has_own_images(self, path: str) -> bool: ...

    def has_images(self, path: str) -> bool: ...


def split_of(name: str) -> str:
    """Return the split that a folder of this name holds: "train", "val", "test" or, for other names, ""."""
    return SPLIT_OF_NAME.get(name.lower(), "")


def find_split_folder(tree: Tree, split: str, where: str) -> str:
    """Return the folder of a split, relative to the tree's root, or "" if the dataset has no splits.

    A folder is a set of splits if all of its folders that hold images have names of splits. Other image folders beside
    them are passed over with a warning, unless a folder with a split's name holds images directly, as they do: then it
    is a class, such as CIFAR-100's `train`.

    Args:
        tree: the dataset.
        split: the split asked for.
        where: the dataset's path, for messages.

    Raises MissingSplitError if the dataset has splits, but not this one.
    """
    base = _find_base(tree)
    folders = tree.folders(base)
    if split in folders and not split_of(split):  # a name of the user's own
        return os.path.join(base, split)
    split_folders = _split_folders(tree, base, folders, where)
    if not split_folders:
        if base:
            log.info("data: %s: reading %s", where, base)
        return base
    names = SPLIT_NAMES.get(split_of(split), (split,))
    matching = [folder for folder in split_folders if folder.lower() in names]
    if not matching:
        raise MissingSplitError(
            f"data.split: {os.path.join(where, base) if base else where} has no folder {split!r}; "
            f"it has {', '.join(split_folders)}"
        )
    best = min(matching, key=lambda folder: (folder != split, names.index(folder.lower()), folder))
    folder = os.path.join(base, best)
    if folder != split:
        log.info("data: %s: the split %s is %s", where, split, folder)
    return folder


def _find_base(tree: Tree) -> str:
    """Return the folder whose folders may be splits: the root, or one that wraps the whole dataset."""
    for path in KAGGLE_IMAGENET:
        if tree.folders(path):
            return path
    top = tree.folders()
    if len(top) == 1 and not split_of(top[0]):
        inner = tree.folders(top[0])
        if len({split_of(name) for name in inner}) > 1 and all(map(split_of, inner)):
            return top[0]
    return ""


def _split_folders(tree: Tree, base: str, folders: Sequence[str], where: str) -> list[str]:
    """Return the folders that are splits, or none of them if they are classes."""
    named = [folder for folder in folders if split_of(folder)]
    if not named or len(named) == len(folders):
        return named
    others = [folder for folder in folders if folder not in named and tree.has_images(os.path.join(base, folder))]
    if not others:
        return named
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    beside = ", ".join(others[:3]) + more
    listed = ", ".join(named)
    if all(tree.has_own_images(os.path.join(base, folder)) for folder in named):
        log.warning("data: %s: %s is read as a class, like the folders beside it (%s)", where, listed, beside)
        return []
    log.warning("data: %s: passed over beside the splits %s: %s", where, listed, beside)
    return named


def choose_shards(shards: Sequence[str], split: str, where: str) -> list[str]:
    """Return the shards of a split, for names such as imagenet-train-0001.tar; all, if some do not name one split.

    Raises MissingSplitError if the shards have splits, but not this one.
    """
    splits = [{split_of(word) for word in re.findall(r"[a-z]+", os.path.basename(s).lower())} - {""} for s in shards]
    if not all(len(names) == 1 for names in splits):
        return list(shards)
    wanted = split_of(split) or split
    chosen = [shard for shard, names in zip(shards, splits, strict=True) if wanted in names]
    if not chosen:
        available = ", ".join(sorted(set.union(*splits)))
        raise MissingSplitError(
            f"data.split: {where} has no shard of {split!r}; it has {available}, by the shards' names"
        )
    return chosen
