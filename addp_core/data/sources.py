"""Where images lie: folders, ImageNet trees, published lists, tar shards and Hugging Face datasets.

All of them have random access.
"""

import hashlib
import importlib.util
import logging
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers import create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.config import DataConfig
from addp_core.data.images import COMMON_EXTENSIONS, IMAGE_EXTENSIONS, LazyImage, wrap_image_errors

log = logging.getLogger("addp")

# For each split, the names under which folders have it.
SPLIT_FOLDERS = {
    "train": ("train",),
    "val": ("val", "validation"),
    "validation": ("validation", "val"),
    "test": ("test",),
}
# Many Hugging Face datasets have no other images to validate on than "test".
HUB_SPLITS = SPLIT_FOLDERS | {"val": ("val", "validation", "test")}
STREAMING_READERS = ("wds", "hfids", "tfds")  # timm's readers without random access


class ImageSource:
    """Images with random access.

    `classes[label]` is the name of a label; `classes` is empty if the images have no labels (label -1). `labels`
    (Long[n]) is set if the labels are known without reading an image.
    """

    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label (-1: none). May raise any error."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return where the image lies, for messages."""
        raise NotImplementedError

    def encoded_size(self, index: int) -> int | None:
        """Return the number of bytes of the encoded image, or None if it is not known without reading it."""
        with suppress(OSError):
            return os.stat(self.name(index)).st_size
        return None

    def digest(self) -> str:
        """Return a digest of the dataset's listing: the same if, and nearly only if, it has the same images.

        It covers the number of images, the classes, all names and known labels in order, and the sizes of 1,000 images
        spread over the dataset: asking a network disk for the size of each of a million files takes minutes. Names are
        relative to their common folder, so that a dataset may be moved. No image is read.
        """
        names = [os.fsencode(self.name(index)) for index in range(len(self))]
        root = len(os.path.commonprefix(names).rpartition(b"/")[0])
        digest = hashlib.blake2b(repr((len(self), self.classes)).encode("utf-8", "backslashreplace"), digest_size=16)
        for name in names:
            digest.update(name[root:] + b"\0")
        if self.labels is not None:
            digest.update(np.asarray(self.labels, dtype="<i8").tobytes())
        for index in range(0, len(self), max(1, len(self) // 1000)):
            digest.update(f"{self.encoded_size(index)} ".encode())
        return digest.hexdigest()

    def open_image(self, index: int) -> tuple[LazyImage, int]:
        """Return the image, of which only the header is decoded, and its label. Raises `ImageError`."""
        with wrap_image_errors():
            encoded, label = self.read_bytes(index)
        return LazyImage(encoded), label

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """Return the whole image, upright 8-bit RGB, and its label or None. Raises `ImageError`."""
        image, label = self.open_image(index)
        return image.decode(), None if label < 0 else label


class _PackedStrings:
    """Many strings in two blocks of memory.

    Forked workers would copy the memory of a list page by page, because reading a string changes its reference count.
    """

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])


class ImageFiles(ImageSource):
    """Image files `root/name`, with or without labels."""

    labels: np.ndarray

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None = None, classes: Sequence[str] = ()
    ):
        self.root, self.classes = root, tuple(classes)
        self._names = _PackedStrings(names)
        self.labels = np.full(len(names), -1) if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the file's content and its label."""
        with open(os.path.join(self.root, self._names[index]), "rb") as file:
            return file.read(), int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the file's path."""
        return os.path.join(self.root, self._names[index])


class TarShards(ImageSource):
    """A .tar file or a folder of .tar files, through timm's indexed reader.

    One level of tars inside tars is read too. As in timm, the class is the innermost folder inside the tar, or the tar
    itself if it has no folders. The label files of webdataset shards are ignored. The tars are indexed each time they
    are opened, which reads them once in full.
    """

    def __init__(self, path: Path):
        try:
            # timm would cache the index as a pickle beside the data, which does not notice when a tar changes.
            self._reader = ReaderImageInTar(str(path), cache_tarinfo=False)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"data.source: {path} cannot be read as .tar ({error}); create it again") from error
        except (ValueError, AssertionError) as error:
            raise UserError(f"data.source: {path} holds no image; expected {COMMON_EXTENSIONS} in the .tar") from error
        for shard in [path] if path.is_file() else sorted(path.glob("*.tar")):
            _warn_if_truncated(shard)
        names = [self._member_path(index) for index in range(len(self._reader))]
        # timm sorts by the name within the shard only and leaves ties in the order of the directory listing.
        self._order = sorted(range(len(names)), key=lambda index: natural_key(names[index]))
        self._names = _PackedStrings(names)
        self._root = path
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.classes = tuple(sorted(self._reader.class_name_to_idx, key=self._reader.class_name_to_idx.get))

    def _member_path(self, index: int) -> str:
        member, shard, nested = self._reader.samples[index]
        return "/".join(part for part in (shard, nested.name if nested else None, member.name) if part)

    def __len__(self) -> int:
        return len(self._order)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the member's content and its label."""
        with self._lock:  # all threads share one file offset
            if self._pid != os.getpid():  # after a fork, processes would share it too: open the files again
                states = [self._reader.tar_state] if self._reader.root_is_tar else self._reader.tar_state.values()
                for state in states:
                    for each in (state, *state.children.values()):
                        each.reset()
                self._pid = os.getpid()
            file, label = self._reader[self._order[index]]
            return file.read(), int(label)

    def name(self, index: int) -> str:
        """Return the path of the tar and, within it, of the member."""
        return f"{self._root}/{self._names[self._order[index]]}"


def _warn_if_truncated(path: Path) -> None:
    """Warn if a tar lacks the zeros at its end: one cut between two members otherwise reads as a shorter tar."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read().strip(b"\0"):
            log.warning("data: %s has no end-of-archive marker and is probably truncated", path)


class HubDataset(ImageSource):
    """`hfds/<name or path>`: a dataset of the Hugging Face hub, or a folder in its format, through timm's reader.

    The split "val" is the first of val, validation and test that the dataset has.
    """

    def __init__(self, source: str, config: DataConfig):
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"data.source: {source!r} needs the package datasets: pip install datasets")
        try:
            self._reader = self._open(source, config)
        except Exception as error:  # not found, offline, no such split or column: the library's message is the best
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"data.source: {source!r} (split {config.split!r}) cannot be opened: {reason}") from error
        self._source, self._image_key = source, config.image_key
        if not len(self._reader):
            raise UserError(f"data.source: {source!r} (split {config.split!r}) holds no image")
        columns = self._reader.dataset[0]
        if columns.get(config.image_key) is None:  # timm adds a missing image column, with None as values
            available = [name for name in columns if name != config.image_key]
            hint = did_you_mean(config.image_key, available)
            raise UserError(
                f"data.image_key: {source!r} has no column {config.image_key!r}; "
                f"expected one of {', '.join(available)}{hint}"
            )
        label_of_class = self._reader.class_to_idx
        self.classes = tuple(sorted(label_of_class, key=label_of_class.get))
        self._has_labels = config.label_key in columns
        if self.classes:
            column = self._reader.dataset.select_columns(config.label_key).with_format("numpy")[:][config.label_key]
            self.labels = np.nan_to_num(column, nan=-1).astype(np.int64)  # NaN: an image without a label

    @staticmethod
    def _open(source: str, config: DataConfig) -> Any:
        """Return timm's reader (untyped) of the split, under the first of its names that the dataset has."""
        errors = []
        for name in HUB_SPLITS.get(config.split, (config.split,)):
            try:
                reader = create_reader(source, split=name, input_key=config.image_key, target_key=config.label_key)
            except ValueError as error:  # among other things, `datasets` raises this for an unknown split
                errors.append(error)
                continue
            if name != config.split:
                log.info("data: %s has no split %r; using %r", source, config.split, name)
            return reader
        raise errors[0]

    def __len__(self) -> int:
        return len(self._reader)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        if not self._has_labels:
            item = self._reader.dataset[index][self._image_key]
            return item["bytes"] or Path(item["path"]).read_bytes(), -1
        file, label = self._reader[index]
        with file:
            return file.read(), int(label)

    def name(self, index: int) -> str:
        """Return the dataset's name and the index."""
        return f"{self._source}[{index}]"


def open_source(
    config: DataConfig | str, split: str | None = None, classes: Sequence[str] | None = None
) -> ImageSource:
    """Open the images at `config.source`.

    The source is, in this order: a Hugging Face dataset `hfds/<name>`; a .tar file; `root/meta/<split>.txt` with lines
    "path label" and the images under `root/<split>/`; the folder `root/<split>`; the folder `root`. A folder holds .tar
    files, or images at any depth. If every image lies in a subfolder, the topmost subfolder is its class (as in
    torchvision); otherwise the images have no classes. Hidden files and files of other types are ignored.

    Args:
        config: the settings, or the source only.
        split: overrides `config.split`.
        classes: names of label 0, 1, ...; overrides `config.classes`.

    Raises UserError if there is nothing to read.
    """
    config = DataConfig(source=config) if isinstance(config, str) else config
    split = split or config.split
    if not config.source:
        raise UserError(
            "data.source: missing; expected a folder of images, a .tar file or a dataset hfds/<name>, as in data=photos"
        )
    if classes is None and config.classes:
        classes = [line for line in _read_lines(Path(config.classes), "data.classes") if line]
    path = Path(config.source).expanduser()
    kind, _, rest = config.source.partition("/")
    if rest and not path.exists():
        if kind == "hfds":
            return _logged(HubDataset(config.source, replace(config, split=split)), config)
        if kind in STREAMING_READERS:
            raise UserError(
                f"data.source: {config.source!r} is a streaming dataset; exact resuming, and an order that does not "
                "depend on the number of workers, need random access; expected a folder of .tar files, or hfds/<name>"
            )
    try:
        return _logged(_open_path(path, split, classes), config)
    except PermissionError as error:
        raise UserError(f"data.source: no permission to read {error.filename or path}") from error


def _logged(source: ImageSource, config: DataConfig) -> ImageSource:
    classes = f"{len(source.classes):,} classes" if source.classes else "no classes"
    log.info("data: %s: %s images, %s", config.source, f"{len(source):,}", classes)
    return source


def _open_path(path: Path, split: str, classes: Sequence[str] | None) -> ImageSource:
    if not path.exists():
        hint = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"data.source: {path} does not exist; expected a folder of images or a .tar file{hint}")
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return TarShards(path)
        raise UserError(
            f"data.source: {path} is a file; expected a folder of images or a .tar file (unpack other archives)"
        )
    list_file = path / "meta" / f"{split}.txt"
    if list_file.is_file():
        return _open_list(path, split, list_file, classes)
    folders = {entry.name for entry in os.scandir(path) if entry.is_dir()}
    split_folder = next((name for name in SPLIT_FOLDERS.get(split, (split,)) if name in folders), None)
    other_splits = sorted(folders & {name for names in SPLIT_FOLDERS.values() for name in names})
    if split_folder is None and other_splits:
        raise UserError(f"data.split: {path} has no folder {split!r}; it has {', '.join(other_splits)}")
    return _open_folder(path / split_folder if split_folder else path, classes)


def _open_folder(root: Path, classes: Sequence[str] | None) -> ImageSource:
    names, other_files = _find_images(root)
    if not names and any(root.glob("*.tar")):
        return TarShards(root)
    if not names:
        if not other_files:
            raise UserError(f"data.source: {root} holds no files; expected images ({COMMON_EXTENSIONS})")
        kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in other_files.most_common(3))
        raise UserError(
            f"data.source: {root} holds no image but {other_files.total()} other files ({kinds}); "
            f"expected {COMMON_EXTENSIONS}"
        )
    if not all(os.sep in name for name in names):
        return ImageFiles(root, names)
    folders = [name.split(os.sep, 1)[0] for name in names]
    subfolders = {entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."}
    class_names = sorted(set(folders) | subfolders) if classes is None else classes
    labels = {name: label for label, name in enumerate(class_names)}
    for folder in set(folders) - set(labels):
        raise UserError(
            f"data.classes: {root / folder} is none of the {len(labels)} classes{did_you_mean(folder, labels)}"
        )
    return ImageFiles(root, names, [labels[folder] for folder in folders], tuple(labels))


def _find_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Return the sorted paths of the images below `root`, relative to it, and the counts of other extensions."""
    names: list[str] = []
    other_files: Counter[str] = Counter()
    visited, pending = set(), [""]
    while pending:
        folder = pending.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in visited:  # a link to a parent, or a second path to the same folder
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if entry.name.startswith("."):  # includes ._x.jpg, in which macOS keeps metadata
                    continue
                if entry.is_dir():
                    pending.append(name)
                elif entry.is_file():
                    extension = os.path.splitext(entry.name)[1].lower()
                    if extension in IMAGE_EXTENSIONS:
                        names.append(name)
                    else:
                        other_files[extension] += 1
    return sorted(names), other_files


def _read_lines(path: Path, key: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error


def _open_list(root: Path, split: str, list_file: Path, classes: Sequence[str] | None) -> ImageFiles:
    """Open a published list: `root/meta/<split>.txt` has a line "path label" for each image `root/<split>/path`."""
    names, labels = [], []
    for number, line in enumerate(_read_lines(list_file, "data.source"), 1):
        if not line:
            continue
        name, _, digits = line.rpartition(" ")
        if not name or not digits.isdecimal():
            raise UserError(f'data.source: {list_file} line {number} is {line!r}; expected "relative/path label"')
        names.append(name.strip())
        labels.append(int(digits))
    if not names:
        raise UserError(f'data.source: {list_file} lists no image; expected lines "relative/path label"')
    for name in (names[0], names[len(names) // 2], names[-1]):
        if not (root / split / name).is_file():
            raise UserError(f"data.source: {list_file} lists {name}, but {root / split / name} does not exist")
    if classes is None:
        classes = _class_names(names, labels)
    elif max(labels) >= len(classes):
        raise UserError(f"data.classes: {list_file} has label {max(labels)}, but there are {len(classes)} classes")
    return ImageFiles(root / split, names, labels, classes)


def _class_names(names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Return the name of each label: the folder of its images if labels and folders correspond, else its number."""
    folders: dict[int, set[str]] = {}
    for name, label in zip(names, labels, strict=True):
        folders.setdefault(label, set()).add(os.path.dirname(name))
    single = {label: next(iter(paths)) for label, paths in folders.items() if len(paths) == 1}
    one_to_one = len(single) == len(folders) == len(set(single.values()))
    return [single.get(label, str(label)) if one_to_one else str(label) for label in range(max(labels) + 1)]
