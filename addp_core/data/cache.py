"""Images of another source kept in memory."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from addp_core.data.images import ImageError, LazyImage
from addp_core.data.sources import ImageSource

log = logging.getLogger("addp")


class CachedSource(ImageSource):
    """Another source's images held in memory, larger ones shrunk to a shorter side of `side` pixels.

    Filled at once, before workers start, so that they share the memory. Unreadable images stay errors. What does not
    fit into `gigabytes` comes from the source each time.
    """

    def __init__(self, source: ImageSource, side: int, gigabytes: float):
        self.classes, self.labels = source.classes, source.labels
        self._source, self._side = source, side
        self._held: list[tuple[np.ndarray | ImageError, tuple[int, int], int] | None] = [None] * len(source)
        room = gigabytes * 2**30
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(source), 256):
                indices = range(first, min(first + 256, len(source)))
                for index, held in zip(indices, pool.map(self._shrunk, indices), strict=True):
                    self._held[index] = held
                    room -= held[0].nbytes if isinstance(held[0], np.ndarray) else 0
                if room <= 0:
                    log.warning("data.cache: %.1f GB hold %d of %d images", gigabytes, indices.stop, len(source))
                    break

    def _shrunk(self, index: int) -> tuple[np.ndarray | ImageError, tuple[int, int], int]:
        """(pixels or what is wrong with them, (width, height) of the original, label)."""
        try:
            picture, label = self._source.open_image(index)
            size = picture.width, picture.height
            factor = min(1.0, self._side / min(size))
            shrunk = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
            return np.array(picture.crop((0, 0, *size), shrunk)), size, label
        except ImageError as error:
            return error, (0, 0), -1

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        return self._source.read_bytes(index)

    def open_image(self, index: int) -> tuple[LazyImage, int]:
        held = self._held[index]
        if held is None:
            return self._source.open_image(index)
        image, size, label = held
        if isinstance(image, ImageError):
            raise ImageError(str(image))
        return LazyImage(Image.fromarray(image), size), label
