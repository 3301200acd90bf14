"""Images with random access: the interface of every dataset, and image files in a folder."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home
from addp_core.data.images import LazyImage, wrap_image_errors


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

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Announce which images are read next, in this order, so that a source may request them together."""

    def name(self, index: int) -> str:
        """Return where the image lies, for messages."""
        raise NotImplementedError

    def encoded_size(self, index: int) -> int | None:
        """Return the number of bytes of the encoded image, or None if it is not known without reading it."""
        with suppress(OSError):
            return os.stat(self.name(index)).st_size
        return None

    def relative_names(self) -> list[bytes]:
        """Return all names, relative to the folder that they share, so that a dataset may be moved."""
        names = [os.fsencode(self.name(index)) for index in range(len(self))]
        first, last = min(names, default=b""), max(names, default=b"")  # all others share what these two share
        shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        start = first.rfind(b"/", 0, shared) + 1
        return [name[start:] for name in names]

    def names_below(self, source: str) -> list[str]:
        """Return the images' paths below the source that a recipe names, for files that are written for each of them.

        Raises UserError if a path leads out of it, so that a file would be written elsewhere.
        """
        root = expand_home(source)
        names = [os.path.relpath(self.name(index), root) for index in range(len(self))]
        for index, name in enumerate(names):
            if name.split(os.sep)[0] == os.pardir:
                raise UserError(f"data.source: the image {self.name(index)} is not below {source}; rename or remove it")
        return names

    def digest(self) -> str:
        """Return a digest of the dataset's listing: the same if, and nearly only if, it has the same images.

        It covers the number of images, the classes, all names and known labels in order, and the sizes of 1,000 images
        spread over the dataset: asking a network disk for the size of each of a million files takes minutes. Names are
        those of `relative_names`. No image is read.
        """
        names = self.relative_names()
        digest = hashlib.blake2b(repr((len(self), self.classes)).encode("utf-8", "backslashreplace"), digest_size=16)
        for name in names:
            digest.update(name + b"\0")
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


class PackedStrings:
    """Many strings in two blocks of memory.

    Forked workers would copy the memory of a list page by page, because reading a string changes its reference count.
    """

    def __init__(self, strings: Sequence[str]):
        text = "".join(strings)
        encoded = strings if text.isascii() else [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = os.fsencode(text)

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
        self._names = PackedStrings(names)
        self.labels = np.full(len(names), -1) if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the file's content and its label."""
        # without a buffer: it would cost as many system calls again
        with open(os.path.join(self.root, self._names[index]), "rb", buffering=0) as file:
            return file.read(), int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the file's path."""
        return os.path.join(self.root, self._names[index])


class Subset(ImageSource):
    """Some images of another source, with its labels and classes."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray):
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        return self._source.read_bytes(int(self._indices[index]))

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Announce which images are read next."""
        self._source.read_ahead(self._indices[np.asarray(indices, dtype=np.int64)].tolist())

    def encoded_size(self, index: int) -> int | None:
        """Return the size of the encoded image, if the source knows it."""
        return self._source.encoded_size(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Return where the image lies."""
        return self._source.name(int(self._indices[index]))

    def open_image(self, index: int) -> tuple[LazyImage, int]:
        """Return the image and its label."""
        return self._source.open_image(int(self._indices[index]))
