"""A cache in memory for the images of another source."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from addp_core.base.cpu import usable_cores
from addp_core.data.images import ImageError, LazyImage
from addp_core.data.sources import ImageSource

log = logging.getLogger("addp")

CHUNK = 256  # images between two checks of the memory limit


class _CachedImage(NamedTuple):
    pixels: np.ndarray | ImageError  # UInt8[h,w,3], or the reason why the image cannot be read
    size: tuple[int, int]  # width and height of the original
    label: int


class CachedSource(ImageSource):
    """The images of another source, decoded into memory; larger ones are downscaled to a shorter side of `side` pixels.

    The cache is filled at once, before workers start, so that they share the memory. Unreadable images raise their
    error again. Images that do not fit into `gigabytes` are read from the source each time.
    """

    def __init__(self, source: ImageSource, side: int, gigabytes: float):
        self.classes, self.labels = source.classes, source.labels
        self._source, self._side = source, side
        self._cached: list[_CachedImage | None] = [None] * len(source)
        free_bytes = gigabytes * 2**30
        with ThreadPoolExecutor(usable_cores()) as pool:
            for first in range(0, len(source), CHUNK):
                indices = range(first, min(first + CHUNK, len(source)))
                source.read_ahead(indices)
                for index, cached in zip(indices, pool.map(self._decode, indices), strict=True):
                    self._cached[index] = cached
                    free_bytes -= cached.pixels.nbytes if isinstance(cached.pixels, np.ndarray) else 0
                if free_bytes <= 0:
                    log.warning(
                        "data.cache: %.1f GB hold %d of %d images; the others are decoded each time",
                        gigabytes,
                        indices.stop,
                        len(source),
                    )
                    break

    def _decode(self, index: int) -> _CachedImage:
        try:
            image, label = self._source.open_image(index)
            size = image.width, image.height
            factor = min(1.0, self._side / min(size))
            downscaled = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
            return _CachedImage(np.array(image.crop((0, 0, *size), downscaled)), size, label)
        except ImageError as error:
            return _CachedImage(error, (0, 0), -1)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Return where the image lies."""
        return self._source.name(index)

    def encoded_size(self, index: int) -> int | None:
        """Return the size of the original encoded image."""
        return self._source.encoded_size(index)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the original encoded image and its label."""
        return self._source.read_bytes(index)

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Announce which images are read next to the source, if they are not cached."""
        self._source.read_ahead([index for index in indices if self._cached[index] is None])

    def open_image(self, index: int) -> tuple[LazyImage, int]:
        """Return the cached image, or the source's if it is not cached, and its label."""
        cached = self._cached[index]
        if cached is None:
            return self._source.open_image(index)
        if isinstance(cached.pixels, ImageError):
            raise ImageError(str(cached.pixels))
        return LazyImage(Image.fromarray(cached.pixels), cached.size), cached.label
