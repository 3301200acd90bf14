"""Where images lie: folders, ImageNet trees, published lists, tar shards here or at an address, Hugging Face datasets.

All of them have random access.
"""

import importlib.util
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers import create_reader

from addp_core.base.addresses import is_address
from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.paths import expand_home
from addp_core.data.config import DataConfig
from addp_core.data.image_source import ImageFiles, ImageSource
from addp_core.data.images import COMMON_EXTENSIONS
from addp_core.data.listing import FolderTree, count_text, is_tar, list_folder
from addp_core.data.remote import RemoteFiles
from addp_core.data.remote_tars import RemoteTarShards
from addp_core.data.splits import find_split_folder, split_of
from addp_core.data.tar_members import MAX_LABEL
from addp_core.data.tars import TarShards

log = logging.getLogger("addp")

# Many Hugging Face datasets have no other images to validate on than "test".
HUB_SPLITS = {"val": ("val", "validation", "test"), "validation": ("validation", "val")}
IMAGENET_VALIDATION = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
STREAMING_READERS = ("wds", "hfids", "tfds")  # timm's readers without random access


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
        self._source, self._split, self._image_key = source, config.split, config.image_key
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
        """Return the dataset's name, the split, the index and, unless it is `image`, the column."""
        column = "" if self._image_key == DataConfig.image_key else f".{self._image_key}"
        return f"{self._source}/{self._split}[{index}]{column}"


def open_source(
    config: DataConfig | str, split: str | None = None, classes: Sequence[str] | None = None, whole: bool = False
) -> ImageSource:
    """Open the images at `config.source`.

    The source is, in this order: the address of .tar files; a Hugging Face dataset `hfds/<name>`; a .tar file;
    `root/meta/<split>.txt` with lines "path label" and the images under `root/<split>/`; the split's folder
    (`find_split_folder`); the folder `root`. A folder holds images or .tar files, at any depth. If every image lies in
    a subfolder, the topmost subfolder is its class (as in torchvision); otherwise the images have no classes. What is
    passed over is counted in the log.

    Args:
        config: the settings, or the source only.
        split: overrides `config.split`.
        classes: names of label 0, 1, ...; overrides `config.classes`.
        whole: read all images of a folder or a .tar file, whatever its folders are called, for use without classes.
            Addresses and datasets of the hub have splits all the same.

    Raises UserError if there is nothing to read.
    """
    config = DataConfig(source=config) if isinstance(config, str) else config
    split = split or config.split
    if not config.source:
        raise UserError(
            "data.source: missing; expected a folder of images, a .tar file or a dataset hfds/<name>, as in data=photos"
        )
    if classes is None and config.classes:
        classes = [line for line in read_lines(expand_home(config.classes), "data.classes") if line]
        name, times = Counter(classes).most_common(1)[0] if classes else ("", 0)
        if times > 1:
            raise UserError(f"data.classes: {config.classes} has {name!r} {times} times; expected each class once")
    if is_address(config.source):
        _log_split(config.source, split, whole)
        files = RemoteFiles(config.tries, config.timeout)
        return _logged(RemoteTarShards(config.source, files, split, classes), config)
    path = expand_home(config.source)
    kind, _, rest = config.source.partition("/")
    if rest and not path.exists():
        if kind == "hfds":
            _log_split(config.source, split, whole)
            return _logged(HubDataset(config.source, replace(config, split=split)), config)
        if kind in STREAMING_READERS:
            raise UserError(
                f"data.source: {config.source!r} is a streaming dataset; exact resuming, and an order that does not "
                "depend on the number of workers, need random access; expected the address of .tar files "
                "(https://host/train-{00..09}.tar), a folder of .tar files, or hfds/<name>"
            )
    try:
        return _logged(_open_path(path, None if whole else split, classes), config)
    except PermissionError as error:
        raise UserError(
            f"data.source: no permission to read {error.filename or path}; change its permissions, or move it away"
        ) from error


def _logged(source: ImageSource, config: DataConfig) -> ImageSource:
    classes = f"{len(source.classes):,} classes" if source.classes else "no classes"
    log.info("data: %s: %s images, %s", config.source, f"{len(source):,}", classes)
    return source


def _log_split(source: str, split: str, whole: bool) -> None:
    if whole:
        log.info("data: %s: of the splits that it may have, %r is read", source, split)


def refuse_results_among_images(source: ImageSource, images: str, results: Iterable[Path]) -> None:
    """Raise UserError if a result would be written among the images, where it may replace one or be read as one.

    Links are followed, those of the results and those that lead to images.

    Args:
        source: the opened images.
        images: where they lie, as the recipe names it: a folder, a file or an address.
        results: the paths of all files that will be written.
    """
    path = expand_home(images)
    if not path.exists() or is_tar(path.name):
        return
    folders = {os.path.dirname(source.name(index)) for index in range(len(source))}
    held = {os.path.realpath(folder) for folder in ({*folders, str(path)} if path.is_dir() else folders)}
    for place in sorted({result.parent for result in results}):
        real = Path(os.path.realpath(place))
        if not held.isdisjoint(map(str, [real, *real.parents] if path.is_dir() else [real])):
            raise UserError(
                f"out: results would be written to {place}, among the images of {images}, and replace some or be read "
                "as images the next time; expected a folder outside of it"
            )


def explain_missing_classes(source: ImageSource, where: str) -> str:
    """Return what to do about a dataset, for messages, if its images have no classes but need some."""
    sort = ""
    if IMAGENET_VALIDATION.fullmatch(os.path.basename(source.name(0))):
        sort = "; ImageNet's are sorted by valprep.sh, which PyTorch's examples/imagenet/extract_ILSVRC.sh runs"
    return (
        f"{where} has no class folders for its {len(source):,} images (such as {source.name(0)}); expected "
        f"<class>/<image>, a list meta/<split>.txt, or .cls files in .tar shards{sort}"
    )


def _open_path(path: Path, split: str | None, classes: Sequence[str] | None) -> ImageSource:
    """Open a folder or a .tar file. split: None for all images."""
    if not path.exists():
        hint = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"data.source: {path} does not exist; expected a folder of images or a .tar file{hint}")
    if path.is_file():
        if is_tar(path.name):
            return TarShards(path, (), split, classes)
        raise UserError(
            f"data.source: {path} is a file; expected a folder of images or a .tar file (unpack other archives)"
        )
    if split is None:
        return _open_folder(path, split, classes)
    list_file = list_of_split(path, split)
    if list_file.is_file():
        return _open_list(path, split, list_file, classes)
    return _open_folder(path / find_split_folder(FolderTree(path), split, str(path)), split, classes)


def list_of_split(root: Path, split: str) -> Path:
    """Return the file of the authors' lists that holds a split's paths and labels; not every dataset has it."""
    return root / "meta" / f"{split}.txt"


def _open_folder(root: Path, split: str | None, classes: Sequence[str] | None) -> ImageSource:
    listing = list_folder(root)
    names = listing.images
    if not names and listing.tars:
        return TarShards(root, listing.tars, split, classes)
    if not names:
        counts = listing.others + listing.passed_over
        if not counts:
            raise UserError(f"data.source: {root} holds no files; expected images ({COMMON_EXTENSIONS})")
        raise UserError(
            f"data.source: {root} holds no image but {counts.total()} other files ({count_text(counts)}); "
            f"expected {COMMON_EXTENSIONS}"
        )
    dropped = listing.passed_over + listing.others + Counter({".tar": len(listing.tars)})
    if dropped:
        log.info("data: %s: passed over: %s", root, count_text(dropped))
    ends = [name.find(os.sep) for name in names]
    if split is None or min(ends) < 0:
        return ImageFiles(root, names)
    folders = [name[:end] for name, end in zip(names, ends, strict=True)]
    # A class without images keeps its label.
    class_names = sorted(set(folders) | set(FolderTree(root).folders())) if classes is None else classes
    if all(map(split_of, class_names)):
        raise UserError(
            f"data.source: {root} holds the splits {', '.join(class_names)} where class folders are expected; "
            f"give one of them, as in data={root / folders[0]}"
        )
    labels = {name: label for label, name in enumerate(class_names)}
    for folder in set(folders) - set(labels):
        raise UserError(
            f"data.classes: {root / folder} is none of the {len(labels)} classes{did_you_mean(folder, labels)}"
        )
    return ImageFiles(root, names, [labels[folder] for folder in folders], tuple(labels))


def read_lines(path: Path, key: str) -> list[str]:
    """Return the lines of a text file, stripped. Raises UserError with the recipe's key if it cannot be read."""
    try:
        # Editors on Windows begin a text with a mark, which utf-8-sig leaves out.
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error


def _open_list(root: Path, split: str, list_file: Path, classes: Sequence[str] | None) -> ImageFiles:
    """Open a published list: `root/meta/<split>.txt` has a line "path label" for each image `root/<split>/path`."""
    names, labels = [], []
    for number, line in enumerate(read_lines(list_file, "data.source"), 1):
        if not line:
            continue
        name, _, digits = line.rpartition(" ")
        if not name or not digits.isdecimal():
            raise UserError(f'data.source: {list_file} line {number} is {line!r}; expected "relative/path label"')
        name = name.strip()
        if os.path.isabs(name) or os.pardir in name.split("/"):
            raise UserError(
                f"data.source: {list_file} line {number} names {name!r}; expected a path below {root / split}"
            )
        if Decimal(digits) > MAX_LABEL:
            raise UserError(
                f"data.source: {list_file} line {number} has label {digits[:20]}; expected at most {MAX_LABEL:,}"
            )
        names.append(name)
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
