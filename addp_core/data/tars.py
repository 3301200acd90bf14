"""Tar shards with random access: ImageNet's tar of tars, a tar for each class, WebDataset's shards, plain archives."""

import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from timm.utils.misc import natural_key

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.image_source import ImageSource, PackedStrings
from addp_core.data.images import COMMON_EXTENSIONS, IMAGE_EXTENSIONS
from addp_core.data.listing import SYSTEM_FOLDERS, Listing, NameTree, count_text, is_image, is_tar, why_passed_over
from addp_core.data.splits import choose_shards, find_split_folder
from addp_core.data.tar_index import Index, cached_index

log = logging.getLogger("addp")

# A WebDataset's label of the image x.jpg is the text of x.cls, or one of these numbers or names in x.json.
LABEL_FILE, JSON_FILE = ".cls", ".json"
JSON_LABELS = ("label", "cls", "class", "class_id", "target")
GZIP_MAGIC = b"\x1f\x8b"
WORDNET_ID = re.compile(r"n\d{8}")  # ImageNet's classes: names that differ in their number only, but no numbering


class Extent(NamedTuple):
    """Where the content of a member lies in the file of its shard, in bytes."""

    offset: int
    size: int


class _Shard:
    """The members of one tar, by their paths; a tar inside is a folder of its name without the extension."""

    def __init__(self, path: Path):
        self.path = path
        self.images: dict[str, Extent] = {}  # the later of two members of one name replaces the earlier, as in tar
        self.printed: dict[str, str] = {}  # paths with the extensions of tars inside, for messages
        self.labels: dict[str, Extent] = {}  # contents of label files
        self.listing = Listing()
        self.is_truncated = False  # it lacks the zeros at the end of a tar

    @classmethod
    def open(cls, path: Path) -> "_Shard":
        """Return the shard with its members, from the index in the user's cache if there is one."""
        shard, read = cls(path), cls(path)

        def build() -> Index:
            read.read()
            return read.as_index()

        if path.is_file():
            shard.fill(cached_index(path, [sorted(IMAGE_EXTENSIONS), sorted(SYSTEM_FOLDERS)], build))
        else:
            shard.read()
        if shard.is_truncated:
            log.warning("data: %s has no end-of-archive marker and is probably truncated", path)
        return shard

    def as_index(self) -> Index:
        """Return the members as `fill` takes them."""
        return {
            "images": self.images,
            "printed": {name: printed for name, printed in self.printed.items() if printed != name},
            "labels": self.labels,
            "passed_over": self.listing.passed_over,
            "others": self.listing.others,
            "is_truncated": self.is_truncated,
        }

    def fill(self, index: Index) -> None:
        """Take the members from an index."""
        self.images = {name: Extent(*extent) for name, extent in index["images"].items()}
        self.printed = {name: index["printed"].get(name, name) for name in self.images}
        self.labels = {name: Extent(*extent) for name, extent in index["labels"].items()}
        self.listing.passed_over.update(index["passed_over"])
        self.listing.others.update(index["others"])
        self.is_truncated = index["is_truncated"]

    def read(self) -> None:
        """Read the headers of the members. Raises UserError if the file is no tar."""
        path = self.path
        try:
            with open(path, "rb") as file:
                magic = file.read(2)
                if not magic:
                    raise UserError(f"data.source: {path} is empty (0 bytes); download it again or remove it")
                if magic == GZIP_MAGIC:
                    raise UserError(
                        f"data.source: {path} is compressed; decompress it first: images are read at random"
                    )
                file.seek(0)
                self._read_members(file, 0, "", "")
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, PermissionError):
                raise
            raise UserError(f"data.source: {path} cannot be read as .tar ({error}); create it again") from error

    def _read_members(self, file: IO[bytes], start: int, folder: str, printed_folder: str) -> None:
        """Add the members of a tar that begins at byte `start` of the shard, under `folder`."""
        extents: dict[str, Extent] = {}
        links: list[tuple[str, str]] = []
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every member's header
                name = os.path.normpath(member.name).lstrip("/")
                reason = why_passed_over(name)
                if reason:
                    self.listing.passed_over[reason] += not member.isdir()
                elif member.islnk() or member.issym():
                    base = "" if member.islnk() else os.path.dirname(name)
                    links.append((name, os.path.normpath(os.path.join(base, member.linkname))))
                elif member.isfile() and member.issparse():
                    self.listing.passed_over["sparse file"] += 1
                elif member.isfile():
                    extents[name] = Extent(start + member.offset_data, member.size)
                    if is_tar(name):
                        inner = tar.extractfile(member)
                        assert inner is not None
                        path = os.path.join(folder, os.path.splitext(name)[0])
                        self._read_members(inner, extents[name].offset, path, os.path.join(printed_folder, name))
                elif not member.isdir():
                    self.listing.passed_over["special file"] += 1
            self._check_end(file, tar.offset)
        targets = dict(links)
        for name, target in links:
            for _ in links:  # links to links
                target = targets.get(target, target)
                if target in extents:
                    break
            if target in extents:
                extents[name] = extents[target]
            else:
                self.listing.passed_over["dangling link"] += 1
        for name, extent in extents.items():
            self._add(os.path.join(folder, name), os.path.join(printed_folder, name), extent)

    def _add(self, name: str, printed: str, extent: Extent) -> None:
        if is_image(name):
            self.images[name], self.printed[name] = extent, printed
        elif os.path.splitext(name)[1].lower() in (LABEL_FILE, JSON_FILE):
            self.labels[name] = extent
        elif not is_tar(name):
            self.listing.add(name)

    def _check_end(self, file: IO[bytes], end: int) -> None:
        """Check that a tar ends in zeros; Python's reader takes damage, and a cut between two members, for the end."""
        file.seek(end)
        block = file.read(512)
        if len(block) < 512:
            self.is_truncated = True
        elif block.strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {end:,}")


class TarShards(ImageSource):
    """The images of .tar files, at any depth of folders and of tars inside tars.

    The rules are those of folders: which names are images and which are passed over, which folders are splits, and that
    the topmost folder is the class. Label files of WebDataset (x.cls or x.json beside x.jpg) are preferred. If no image
    lies in a folder, the shard is the class, unless the shards are numbered. Images are sorted by shard and name, the
    classes too, with numbers in their order. The headers of large tars are read once (addp_core/data/tar_index.py).
    """

    labels: np.ndarray

    def __init__(self, root: Path, shards: Sequence[str], split: str, classes: Sequence[str] | None = None):
        """Index the shards.

        Args:
            root: the folder of the shards, or the only .tar file.
            shards: their paths relative to `root`; none: `root` itself.
            split: the split to read, if the names of the shards or the folders in them say so.
            classes: names of label 0, 1, ...; by default those of the images.

        Raises UserError if a shard is no .tar file, there is no image or no such split, or a class is not in `classes`.
        """
        self._root = root
        chosen = choose_shards(shards, split, str(root)) if shards else [""]
        indexed = {name: _Shard.open(root / name) for name in chosen}
        dropped = sum((shard.listing.passed_over + shard.listing.others for shard in indexed.values()), Counter[str]())
        members = [_Member(name, shard, path) for name, shard in indexed.items() for path in shard.images]
        if not members:
            found = f" but {count_text(dropped)}" if dropped else ""
            raise UserError(f"data.source: {root} holds no image{found}; expected {COMMON_EXTENSIONS} in the .tar")
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

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the member's content and its label."""
        shard, offset, size = self._extents[index].tolist()
        # Opened for each image: processes and threads that share an open file would share its position too.
        with open(self._root / self._shards[shard], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError("the .tar has become shorter")
        return content, int(self.labels[index])

    def encoded_size(self, index: int) -> int:
        """Return the member's size."""
        return int(self._extents[index, 2])

    def name(self, index: int) -> str:
        """Return the path of the tar and, within it, of the member."""
        return f"{self._root}/{self._names[index]}"


class _Member:
    """An image of a shard while the index is built."""

    __slots__ = ("extent", "folder_path", "path", "printed", "shard")

    def __init__(self, shard: str, source: _Shard, path: str):
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
    wrapper = os.path.commonpath([os.path.dirname(member.path) for member in members])
    prefix = f"{wrapper}/" if wrapper else ""
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


def _read_label_files(members: list[_Member], indexed: dict[str, _Shard]) -> list[int | str | None] | None:
    """Return each image's label from its label file, or None if the shards have none."""
    keys = {member.label_key for member in members}
    for extension in (LABEL_FILE, JSON_FILE):
        found: dict[tuple[str, str], int | str] = {}
        for name, shard in indexed.items():
            with open(shard.path, "rb") as file:
                for path, extent in shard.labels.items():
                    if os.path.splitext(path)[1].lower() == extension and _label_key(name, path) in keys:
                        file.seek(extent.offset)
                        label = _parse_label(file.read(extent.size), extension, f"{shard.path}/{path}")
                        if label is None:  # JSON without a label, such as a caption: the other files have none either
                            break
                        found[_label_key(name, path)] = label
        if found:
            log.info("data: labels are read from the %s files beside the images", extension)
            missing = sum(member.label_key not in found for member in members)
            if missing:
                log.warning("data: %d of %d images have no %s file", missing, len(members), extension)
            return [found.get(member.label_key) for member in members]
    return None


def _parse_label(content: bytes, extension: str, where: str) -> int | str | None:
    try:
        text = content.decode("utf-8").strip()
        if extension == JSON_FILE:
            value = json.loads(text)
            values = [value[key] for key in JSON_LABELS if key in value] if isinstance(value, dict) else []
            labels = [v for v in values if isinstance(v, int | str) and not isinstance(v, bool) and v != ""]
            if not labels:
                return None
            text = str(labels[0])
    except ValueError as error:
        raise UserError(f"data.source: {where} cannot be read as a label ({error}); expected a number") from error
    if not text or text.startswith("-"):
        raise UserError(f"data.source: {where} is {text!r}; expected the number or the name of a class")
    return int(text) if text.isdecimal() else text


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
        return names, np.array([-1 if label is None else int(label) for label in labels], dtype=np.int64)
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
