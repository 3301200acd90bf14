"""Tar shards with random access: ImageNet's tar of tars, a tar for each class, WebDataset's shards, plain archives."""

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.image_source import ImageSource, PackedStrings
from addp_core.data.images import COMMON_EXTENSIONS
from addp_core.data.listing import NameTree, count_text, natural_key
from addp_core.data.splits import choose_shards, find_split_folder, split_of
from addp_core.data.tar_index import cached_index
from addp_core.data.tar_members import JSON_FILE, LABEL_FILE, RULES, Extent, TarMembers

log = logging.getLogger("addp")

WORDNET_ID = re.compile(r"n\d{8}")  # ImageNet's classes: names that differ in their number only, but no numbering


class TarShards(ImageSource):
    """The images of .tar files, at any depth of folders and of tars inside tars.

    The rules are those of folders: which names are images and which are passed over, which folders are splits, and that
    the topmost folder is the class. Label files of WebDataset (x.cls or x.json beside x.jpg) are preferred. If no image
    lies in a folder, the shard is the class, unless the shards are numbered. Images are sorted by shard and name, the
    classes too, with numbers in their order. The headers of large tars are read once (addp_core/data/tar_index.py).
    """

    labels: np.ndarray

    def __init__(
        self, root: Path | str, shards: Sequence[str], split: str | None, classes: Sequence[str] | None = None
    ):
        """Index the shards.

        Args:
            root: the folder of the shards, or the only .tar file; a text if it is no path on the disk.
            shards: their paths relative to `root`; none: `root` itself.
            split: the split to read, if the names of the shards or the folders in them say so; None for all images.
            classes: names of label 0, 1, ...; by default those of the images.

        Raises UserError if a shard is no .tar file, there is no image or no such split, or a class is not in `classes`.
        """
        self._root = root
        chosen = list(shards) or [""]
        if shards and split is not None:
            chosen = choose_shards(shards, split, str(root))
        indexed = dict(zip(chosen, self._read_indexes(chosen), strict=True))
        dropped = sum((shard.listing.passed_over + shard.listing.others for shard in indexed.values()), Counter[str]())
        members = [_Member(name, shard, path) for name, shard in indexed.items() for path in shard.images]
        if not members:
            found = f" but {count_text(dropped)}" if dropped else ""
            raise UserError(f"data.source: {root} holds no image{found}; expected {COMMON_EXTENSIONS} in the .tar")
        if split is not None:
            members = _members_of_split(members, split, str(root))
        members.sort(key=lambda member: (natural_key(member.printed), member.printed))
        labels: Sequence[int | str | None] | None = _read_label_files(members, indexed)
        if labels is None:
            dropped += Counter(os.path.splitext(name)[1].lower() for s in indexed.values() for name in s.labels)
            labels = _read_folders(members, str(root), classes)
        if dropped:
            log.info("data: %s: passed over: %s", root, count_text(dropped))
        if labels:
            self.classes, self.labels = _number(labels, str(root), classes)
        else:
            self.labels = np.full(len(members), -1)
        shard_numbers = {name: number for number, name in enumerate(chosen)}
        self._shards = PackedStrings(chosen)
        self._names = PackedStrings([member.printed for member in members])
        self._extents = np.array([(shard_numbers[m.shard], *m.extent) for m in members], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def _read_indexes(self, shards: Sequence[str]) -> list[TarMembers]:
        """Return the members of shards, from the indexes in the user's cache where there are any."""
        return [_read_index(Path(self._root, shard)) for shard in shards]

    def extent(self, index: int) -> tuple[str, Extent]:
        """Return the shard that holds an image, relative to the root, and where."""
        shard, offset, size = self._extents[index].tolist()
        return self._shards[shard], Extent(offset, size)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the member's content and its label."""
        shard, extent = self.extent(index)
        # Opened for each image: processes and threads that share an open file would share its position too.
        with open(Path(self._root, shard), "rb") as file:
            file.seek(extent.offset)
            content = file.read(extent.size)
        if len(content) < extent.size:
            raise OSError("the .tar has become shorter")
        return content, int(self.labels[index])

    def encoded_size(self, index: int) -> int:
        """Return the member's size."""
        return int(self._extents[index, 2])

    def name(self, index: int) -> str:
        """Return the path of the tar and, within it, of the member."""
        return f"{self._root}/{self._names[index]}"


def _read_index(path: Path) -> TarMembers:
    members = TarMembers(str(path))

    def read() -> TarMembers:
        return members.read(lambda: open(path, "rb"))

    if path.is_file():
        members = TarMembers.from_index(str(path), cached_index(path, RULES, lambda: read().as_index()))
    else:
        read()
    members.warn_if_truncated()
    return members


class _Member:
    """An image of a shard while the index is built."""

    __slots__ = ("extent", "folder_path", "path", "printed", "shard")

    def __init__(self, shard: str, source: TarMembers, path: str):
        self.shard, self.path, self.extent = shard, path, source.images[path]
        self.printed = os.path.join(shard, source.printed[path])
        self.folder_path = path  # without the folders that lie around all images

    @property
    def label_key(self) -> tuple[str, str]:
        """What the image shares with its label file: the shard, and the path up to the first dot of the name."""
        return _label_key(self.shard, self.path)


def _label_key(shard: str, path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return shard, f"{folder}/{name.partition('.')[0]}"


def _members_of_split(members: list[_Member], split: str, where: str) -> list[_Member]:
    """Return the images of the split, if the folders in the shards are splits, with their paths below its folder."""
    shared = os.path.commonpath([os.path.dirname(member.path) for member in members]).split("/")
    # A split's folder around all images is no mere wrapper: a tar of train/ has no other split.
    wrapper = itertools.takewhile(lambda folder: not split_of(folder), shared)
    prefix = "".join(f"{folder}/" for folder in wrapper if folder)
    folder = find_split_folder(NameTree(member.path[len(prefix) :] for member in members), split, where)
    prefix += f"{folder}/" if folder else ""
    members = [member for member in members if member.path.startswith(prefix)]
    for member in members:
        member.folder_path = member.path[len(prefix) :]
    return members


def _read_folders(members: list[_Member], where: str, classes: Sequence[str] | None) -> list[str] | None:
    """Return the class of each image: its topmost folder, or its shard; None if they have no classes."""
    in_folders = ["/" in member.folder_path for member in members]
    if not any(in_folders):
        return _shard_names(members, where, classes)
    if all(in_folders):
        return [member.folder_path.partition("/")[0] for member in members]
    return None


def _shard_names(members: list[_Member], where: str, classes: Sequence[str] | None) -> list[str] | None:
    """Return the shard of each image as its class, or None if the shards are parts of one dataset."""
    stems = {member.shard: os.path.splitext(os.path.basename(member.shard))[0] for member in members}
    names = set(stems.values())
    numbered = len({re.sub(r"\d+", "0", name) for name in names}) == 1 and not all(map(WORDNET_ID.fullmatch, names))
    if numbered and not (classes is not None and names <= set(classes)):
        if len(names) > 1:
            log.info("data: %s: the names of the shards are numbers of parts, not classes", where)
        return None
    return [stems[member.shard] for member in members]


def _read_label_files(members: list[_Member], indexed: Mapping[str, TarMembers]) -> list[int | str | None] | None:
    """Return each image's label from its label file, or None if the shards have none."""
    keys = {member.label_key for member in members}
    for extension in (LABEL_FILE, JSON_FILE):
        found: dict[tuple[str, str], int | str] = {}
        for name, shard in indexed.items():
            for path, label in shard.labels.items():
                if os.path.splitext(path)[1].lower() == extension and _label_key(name, path) in keys:
                    if label.problem:
                        raise UserError(f"data.source: {shard.where}/{path} {label.problem}")
                    if label.value is None:  # JSON without a label, such as a caption: the other files have none either
                        break
                    found[_label_key(name, path)] = label.value
        if found:
            log.info("data: labels are read from the %s files beside the images", extension)
            missing = sum(member.label_key not in found for member in members)
            if missing:
                log.warning("data: %d of %d images have no %s file", missing, len(members), extension)
            return [found.get(member.label_key) for member in members]
    return None


def _number(
    labels: Sequence[int | str | None], where: str, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the classes and Long[n] with the label of each image; -1 where it has none."""
    known = {label for label in labels if label is not None}
    if all(isinstance(label, int) for label in known):
        highest = max(int(label) for label in known)
        if classes is not None and highest >= len(classes):
            raise UserError(f"data.classes: {where} has label {highest}, but there are {len(classes)} classes")
        names = tuple(map(str, range(highest + 1))) if classes is None else tuple(classes)
        places: dict[int, int] = {}  # of the numbers, if they are names: sorted folders are 0, 1, 10, 2
        if set(names) == set(map(str, range(len(names)))):
            places = {int(name): place for place, name in enumerate(names)}
        values = [-1 if label is None else int(label) for label in labels]
        return names, np.array([places.get(value, value) for value in values], dtype=np.int64)
    texts = [None if label is None else str(label) for label in labels]
    if classes is None:
        classes = sorted({text for text in texts if text is not None}, key=lambda text: (natural_key(text), text))
    numbers = {name: number for number, name in enumerate(classes)}
    for text in texts:
        if text is not None and text not in numbers:
            raise UserError(
                f"data.classes: {where}/{text} is none of the {len(numbers)} classes{did_you_mean(text, numbers)}"
            )
    return tuple(numbers), np.array([-1 if text is None else numbers[text] for text in texts], dtype=np.int64)
