"""Which files of a dataset are images: one set of rules for folders, tar shards and segmentation."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from addp_core.data.images import IMAGE_EXTENSIONS

# Folders in which operating systems and network disks keep their own files, thumbnails or deleted files.
SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__"),
}


# The most common first: a listing asks for each of a million files.
IMAGE_SUFFIXES = tuple(sorted(IMAGE_EXTENSIONS, key=lambda suffix: suffix not in (".jpeg", ".jpg", ".png")))


def is_image(name: str) -> bool:
    """Check whether a file's name has the extension of an image, in any case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_tar(name: str) -> bool:
    """Check whether a file's name has the extension .tar, in any case."""
    return os.path.splitext(name)[1].lower() == ".tar"


def why_passed_over(name: str) -> str:
    """Return why a file or folder is no part of a dataset, or "" if it is.

    Hidden names are passed over, among them macOS's ._x.jpg and .ipynb_checkpoints/, and so are the folders of
    operating systems and network disks, with all that they hold. A name that leads out of a tar is none of its files,
    and what is written for each image would be written elsewhere.

    name: a path relative to the dataset's root.
    """
    for part in name.split("/"):
        if part == "..":
            return "with .. in the name"
        if part.startswith(".") and part != ".":
            return "hidden"
        if part.lower() in SYSTEM_FOLDERS:
            return f"in {part}/"
    return ""


def natural_key(name: str) -> tuple[str | Decimal, ...]:
    """Return a key that sorts names without regard to case and the numbers in them by value: 9.png before 10.png."""
    parts = re.split(r"(\d+)", name.lower())  # every second part is a number, in any script
    return tuple(Decimal(part) if i % 2 else part for i, part in enumerate(parts))  # int() has a limit of 4,300 digits


@dataclass
class Listing:
    """The files of a folder or a tar, sorted by what becomes of them."""

    images: list[str] = field(default_factory=list)  # sorted paths, relative to the root
    tars: list[str] = field(default_factory=list)  # the same, of .tar files
    others: Counter[str] = field(default_factory=Counter)  # extensions of the other files
    passed_over: Counter[str] = field(default_factory=Counter)  # reasons why names are no part of the dataset

    def add(self, name: str) -> None:
        """Add a file that is part of the dataset."""
        if is_image(name):
            self.images.append(name)
        elif is_tar(name):
            self.tars.append(name)
        else:
            self.others[os.path.splitext(name)[1].lower() or "without extension"] += 1


def count_text(counts: Counter[str]) -> str:
    """Return counts as text, the largest first: "8 hidden, 3 in __MACOSX/, 2 .txt"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def list_folder(root: Path) -> Listing:
    """List the files below a folder, with links followed. Raises PermissionError for a folder that may not be read."""
    listing = Listing()
    for name in walk(root, passed_over=listing.passed_over):
        if is_image(name):
            listing.images.append(name)
        else:
            listing.add(name)
    listing.images.sort()
    listing.tars.sort()
    return listing


def walk(root: Path, folder: str = "", passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Yield the paths of the files below `root/folder`, relative to `root`; count in `passed_over` what is left out.

    The files of a folder come in no particular order. A folder to which links lead is entered once, even if they lead
    in a circle: under its own name if it lies below `root/folder`, because that may be its class; otherwise, of several
    links in one folder, by the one with the last name.
    """
    counts: Counter[str] = Counter() if passed_over is None else passed_over
    visited, pending = set(), [folder]
    links: list[str] = []  # to folders, which are followed when all others have been entered
    while pending or links:
        if not pending:
            pending, links = links, []
        folder = pending.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in visited:
            counts["linked folder read once"] += 1
            continue
        visited.add((status.st_dev, status.st_ino))
        prefix = os.path.join(folder, "")
        folders: list[str] = []
        linked: list[str] = []
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:  # a million times for ImageNet: what is tested here is what most files need
                name = entry.name
                if name.startswith(".") or name.lower() in SYSTEM_FOLDERS:
                    counts[why_passed_over(name)] += 1
                elif (kind := entry_kind(entry)) == "file":
                    yield prefix + name
                elif kind == "folder":
                    (linked if entry.is_symlink() else folders).append(prefix + name)
                else:
                    counts[kind] += 1
        pending += sorted(folders)
        links += sorted(linked)


def entry_kind(entry: os.DirEntry[str]) -> str:
    """Return what an entry of a directory is: "folder", "file", or the reason why it is neither."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError:  # a link to itself, or to a folder that may not be read
        pass
    return "dangling link" if entry.is_symlink() else "special file"


class FolderTree:
    """What the search for splits asks of a folder on the disk."""

    def __init__(self, root: Path):
        self.root = root

    def folders(self, path: str = "") -> list[str]:
        """Return the names of the folders directly in `path` that are part of the dataset, sorted."""
        if not (self.root / path).is_dir():
            return []
        with os.scandir(self.root / path) as entries:
            return sorted(e.name for e in entries if not why_passed_over(e.name) and entry_kind(e) == "folder")

    def has_own_images(self, path: str) -> bool:
        """Check whether image files lie directly in `path`."""
        with os.scandir(self.root / path) as entries:
            return any(is_image(e.name) and not why_passed_over(e.name) and entry_kind(e) == "file" for e in entries)

    def has_images(self, path: str) -> bool:
        """Check whether images or .tar files lie in `path` at any depth."""
        return any(is_image(name) or is_tar(name) for name in walk(self.root, path))


class NameTree:
    """The same of the paths of images, as in a tar."""

    def __init__(self, names: Iterable[str]):
        self._folders: dict[str, set[str]] = {"": set()}
        self._own_images: set[str] = set()
        for name in names:
            folder = os.path.dirname(name)
            self._own_images.add(folder)
            while folder not in self._folders:
                self._folders[folder] = set()
                folder = os.path.dirname(folder)
        for folder in self._folders:
            if folder:
                self._folders[os.path.dirname(folder)].add(os.path.basename(folder))

    def folders(self, path: str = "") -> list[str]:
        """Return the names of the folders directly in `path`, sorted."""
        return sorted(self._folders.get(path, ()))

    def has_own_images(self, path: str) -> bool:
        """Check whether images lie directly in `path`."""
        return path in self._own_images

    def has_images(self, path: str) -> bool:
        """Check whether images lie in `path` at any depth: a tar's folders are known by their images only."""
        return path in self._folders
