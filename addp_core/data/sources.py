"""Where images lie: folders, ImageNet trees, published lists, tar shards and hub sets, all with random access."""

import importlib.util
import logging
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.readers import create_reader
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from addp_core.base.errors import UserError, did_you_mean
from addp_core.data.config import DataConfig
from addp_core.data.images import EXPECTED, IMAGE_EXTENSIONS, LazyImage, wrap_image_errors

log = logging.getLogger("addp")

SPLITS = {"train": ("train",), "val": ("val", "validation"), "validation": ("validation", "val"), "test": ("test",)}
HUB_SPLITS = SPLITS | {"val": ("val", "validation", "test")}  # many hub sets have no other images to validate on
STREAM_ONLY = ("wds", "hfids", "tfds")


class ImageSource:
    """Images with random access. `classes[label]` names a label; it is empty where the images have none (label -1).

    labels: Long[n], where they are known without reading an image.
    """

    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label (-1: none). May raise anything."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image lies, for messages."""
        raise NotImplementedError

    def open_image(self, index: int) -> tuple[LazyImage, int]:
        """The image, decoded as far as its header, and its label. Raises `ImageError`."""
        with wrap_image_errors():
            encoded, label = self.read_bytes(index)
        return LazyImage(encoded), label

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """The whole image, upright 8-bit RGB, and its label or None. Raises `ImageError`."""
        picture, label = self.open_image(index)
        return picture.decode(), None if label < 0 else label


class _Names(Sequence):
    """Many strings in two blocks of memory: of a list, forked workers copy page after page by counting references."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])


class ImageFiles(ImageSource):
    """Image files `root/name`, with a label each or none."""

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None = None, classes: Sequence[str] = ()
    ):
        self.root, self.classes = root, tuple(classes)
        self._names = _Names(names)
        self.labels = np.full(len(names), -1) if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        with open(os.path.join(self.root, self._names[index]), "rb") as file:
            return file.read(), int(self.labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._names[index])


class TarShards(ImageSource):
    """A .tar file or a folder of them, through timm's indexed reader; one level of tars within tars is read too.

    As there, the class is the innermost folder inside the tar, or the tar itself where it has no folders. The label
    files of webdataset shards are not read. The tars are indexed at every start, which reads them through once.
    """

    def __init__(self, path: Path):
        try:
            # timm's cache of the index would be a pickle beside the data that does not notice a changed tar
            self._reader = ReaderImageInTar(str(path), cache_tarinfo=False)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"data.source: {path} cannot be read as .tar ({error}); make the archive anew") from error
        except (ValueError, AssertionError) as error:
            raise UserError(f"data.source: {path} holds no image; expected {EXPECTED} inside the .tar") from error
        for shard in [path] if path.is_file() else sorted(path.glob("*.tar")):
            _warn_of_cut(shard)
        names = [self._inside(index) for index in range(len(self._reader))]
        # timm sorts by the name within the shard alone and leaves ties in the order of the file system
        self._order = sorted(range(len(names)), key=lambda index: natural_key(names[index]))
        self._names = _Names(names)
        self._root = path
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.classes = tuple(sorted(self._reader.class_name_to_idx, key=self._reader.class_name_to_idx.get))

    def _inside(self, index: int) -> str:
        member, shard, nested = self._reader.samples[index]
        return "/".join(part for part in (shard, nested.name if nested else None, member.name) if part)

    def __len__(self) -> int:
        return len(self._order)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        with self._lock:  # one file offset for all threads
            if self._pid != os.getpid():  # and, after a fork, for all processes: each opens its own
                states = [self._reader.tar_state] if self._reader.root_is_tar else self._reader.tar_state.values()
                for state in states:
                    for each in (state, *state.children.values()):
                        each.reset()
                self._pid = os.getpid()
            file, label = self._reader[self._order[index]]
            return file.read(), int(label)

    def name(self, index: int) -> str:
        return f"{self._root}/{self._names[self._order[index]]}"


def _warn_of_cut(path: Path) -> None:
    """A tar that was cut between two members reads as a sound, shorter one: only the zeros at its end are missing."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read().strip(b"\0"):
            log.warning("data: %s does not end as a .tar does: is it cut short?", path)


class HubDataset(ImageSource):
    """`hfds/<name or path>`: a set of the Hugging Face hub, or a folder `datasets` knows, through timm's reader.

    The split "val" is whichever of val, validation and test the set has, in this order.
    """

    def __init__(self, source: str, config: DataConfig):
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"data.source: {source!r} needs the package datasets: pip install datasets")
        try:
            self._reader = self._open(source, config)
        except Exception as error:  # not found, offline, no such split or column: the hub says it best
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"data.source: {source!r} (split {config.split!r}) cannot be opened: {reason}") from error
        self._source, self._image_key = source, config.image_key
        if not len(self._reader):
            raise UserError(f"data.source: {source!r} (split {config.split!r}) holds no image")
        columns = self._reader.dataset[0]
        if columns.get(config.image_key) is None:  # to ask for a column makes it, empty
            known = [name for name in columns if name != config.image_key]
            found = f"no column {config.image_key!r}; expected one of {', '.join(known)}{did_you_mean(config.image_key, known)}"
            raise UserError(f"data.image_key: {source!r} has {found}")
        names = self._reader.class_to_idx
        self.classes = tuple(sorted(names, key=names.get))
        self._labelled = config.label_key in columns
        if self.classes:
            column = self._reader.dataset.select_columns(config.label_key).with_format("numpy")[:][config.label_key]
            self.labels = np.nan_to_num(column, nan=-1).astype(np.int64)  # NaN: an image without a label

    @staticmethod
    def _open(source: str, config: DataConfig) -> Reader:
        """timm's reader of the split; of several names, the first that the set knows."""
        unknown = None
        for name in HUB_SPLITS.get(config.split, (config.split,)):
            try:
                reader = create_reader(source, split=name, input_key=config.image_key, target_key=config.label_key)
            except ValueError as error:  # how `datasets` says that there is no such split, among other things
                unknown = unknown or error
                continue
            if name != config.split:
                log.info("data: %s has no split %r; %r is taken", source, config.split, name)
            return reader
        raise unknown

    def __len__(self) -> int:
        return len(self._reader)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        if not self._labelled:
            item = self._reader.dataset[index][self._image_key]
            return item["bytes"] or Path(item["path"]).read_bytes(), -1
        file, label = self._reader[index]
        with file:
            return file.read(), int(label)

    def name(self, index: int) -> str:
        return f"{self._source}[{index}]"


def open_source(
    config: DataConfig | str, split: str | None = None, classes: Sequence[str] | None = None
) -> ImageSource:
    """Opens what lies at `config.source`. `split` and `classes` (names by label) override the config's.

    In this order: a hub set `hfds/<name>`; a .tar file; `root/meta/<split>.txt` with lines "path label" and the images
    under `root/<split>/`; the folder `root/<split>`; the root itself. A folder holds .tar files, or images at any
    depth: where every image lies in a folder below it, the topmost such folder is its class (as torchvision has it),
    else it has none. Files of other kinds and hidden ones are passed over. Raises `UserError` where there is nothing
    to read.
    """
    config = DataConfig(source=config) if isinstance(config, str) else config
    split = split or config.split
    if not config.source:
        raise UserError(
            "data.source: missing; expected a folder of images, a .tar file or a hub set, as in data=photos"
        )
    if classes is None and config.classes:
        classes = [line for line in _lines(Path(config.classes), "data.classes") if line]
    path = Path(config.source).expanduser()
    kind, _, rest = config.source.partition("/")
    if rest and not path.exists():
        if kind == "hfds":
            return _opened(HubDataset(config.source, _with_split(config, split)), config)
        if kind in STREAM_ONLY:
            raise UserError(
                f"data.source: {config.source!r} is a stream: without random access, no exact continuing and no order "
                "that is the same for any number of workers; expected a folder of .tar files, or hfds/<name>"
            )
    try:
        return _opened(_open_path(path, split, classes), config)
    except PermissionError as error:
        raise UserError(f"data.source: no permission to read {error.filename or path}") from error


def _with_split(config: DataConfig, split: str) -> DataConfig:
    return DataConfig(**{**vars(config), "split": split})


def _opened(source: ImageSource, config: DataConfig) -> ImageSource:
    kind = f"{len(source.classes):,} classes" if source.classes else "no classes"
    log.info("data: %s: %s images, %s", config.source, f"{len(source):,}", kind)
    return source


def _open_path(path: Path, split: str, classes: Sequence[str] | None) -> ImageSource:
    if not path.exists():
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"data.source: {path} does not exist; expected a folder of images or a .tar file{near}")
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return TarShards(path)
        raise UserError(f"data.source: {path} is a file; expected a folder of images or a .tar file; unpack others")
    listed = path / "meta" / f"{split}.txt"
    if listed.is_file():
        return _open_list(path, split, listed, classes)
    folders = {entry.name for entry in os.scandir(path) if entry.is_dir()}
    part = next((name for name in SPLITS.get(split, (split,)) if name in folders), None)
    others = sorted(folders & {name for names in SPLITS.values() for name in names})
    if part is None and others:
        raise UserError(f"data.split: {path} has no folder {split!r}; it has {', '.join(others)}")
    return _open_folder(path / part if part else path, classes)


def _open_folder(root: Path, classes: Sequence[str] | None) -> ImageSource:
    names, others = _scan(root)
    if not names and any(root.glob("*.tar")):
        return TarShards(root)
    if not names:
        if not others:
            raise UserError(f"data.source: {root} holds no file at all; expected images ({EXPECTED})")
        kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in others.most_common(3))
        raise UserError(f"data.source: {root} holds no image but {others.total()} files ({kinds}); expected {EXPECTED}")
    if not all(os.sep in name for name in names):
        return ImageFiles(root, names)
    folders = [name.split(os.sep, 1)[0] for name in names]
    found = sorted(set(folders) | {entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."})
    labels = {name: label for label, name in enumerate(found if classes is None else classes)}
    for folder in set(folders) - set(labels):
        raise UserError(
            f"data.classes: {root / folder} is none of the {len(labels)} classes{did_you_mean(folder, labels)}"
        )
    return ImageFiles(root, names, [labels[folder] for folder in folders], tuple(labels))


def _scan(root: Path) -> tuple[list[str], Counter]:
    """Image files below `root`, sorted, relative to it; and how many files there are of other extensions."""
    names, others, seen, pending = [], Counter(), set(), [""]
    while pending:
        folder = pending.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or a second way to the same folder
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if entry.name.startswith("."):  # among them ._x.jpg, which is no image
                    continue
                if entry.is_dir():
                    pending.append(name)
                elif entry.is_file():
                    extension = os.path.splitext(entry.name)[1].lower()
                    if extension in IMAGE_EXTENSIONS:
                        names.append(name)
                    else:
                        others[extension] += 1
    return sorted(names), others


def _lines(path: Path, key: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error


def _open_list(root: Path, split: str, listed: Path, classes: Sequence[str] | None) -> ImageFiles:
    """The published lists: `root/meta/<split>.txt`, a line "path label" for each image `root/<split>/path`."""
    names, labels = [], []
    for number, line in enumerate(_lines(listed, "data.source"), 1):
        if not line:
            continue
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal():
            raise UserError(f'data.source: {listed} line {number} is {line!r}; expected "relative/path label"')
        names.append(name.strip())
        labels.append(int(label))
    if not names:
        raise UserError(f'data.source: {listed} lists no image; expected lines "relative/path label"')
    for name in (names[0], names[len(names) // 2], names[-1]):
        if not (root / split / name).is_file():
            raise UserError(f"data.source: {listed} lists {name}, but {root / split / name} does not exist")
    if classes is None:
        folders: dict[int, set[str]] = {}
        for name, label in zip(names, labels, strict=True):
            folders.setdefault(label, set()).add(os.path.dirname(name))
        named = {label: next(iter(known)) for label, known in folders.items() if len(known) == 1}
        distinct = len(named) == len(folders) == len(set(named.values()))
        classes = [named.get(label, str(label)) if distinct else str(label) for label in range(max(labels) + 1)]
    elif max(labels) >= len(classes):
        raise UserError(f"data.classes: {listed} has label {max(labels)}, but there are {len(classes)} classes")
    return ImageFiles(root / split, names, labels, classes)
