"""Which files of a dataset are images: one set of rules for folders, tar shards and segmentation."""

import os
from collections import Counter

from addp_core.data.images import IMAGE_EXTENSIONS

# Folders in which operating systems and network disks keep their own files, thumbnails or deleted files.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information")
    + ("lost+found", "__pycache__")
)


def is_image(name: str) -> bool:
    """Check whether a file's name has the extension of an image, in any case."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def why_passed_over(name: str) -> str:
    """Return why a file or folder is no part of a dataset, or "" if it is.

    Hidden names are passed over, among them macOS's ._x.jpg and .ipynb_checkpoints/, and so are the folders of
    operating systems and network disks. The answer is a noun for `describe_counts`.

    name: relative to the dataset's root; one such part decides for all that lies below it.
    """
    for part in name.split("/"):
        if part.startswith(".") and part not in (".", ".."):
            return "hidden"
        if part.lower() in SYSTEM_FOLDERS:
            return f"in {part}/"
    return ""


def describe_counts(counts: Counter[str]) -> str:
    """Return counts as text, the largest first: "8 hidden, 3 in __MACOSX/"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
