"""ImageNet-C generated on the fly from clean images."""

from collections.abc import Sequence

import numpy as np

from addp_core.base.rng import seed_for
from addp_core.data.corruptions import REFERENCE_SIDE, corrupted_jpeg
from addp_core.data.images import LazyImage, eval_transform
from addp_core.data.sources import ImageSource
from cls.data import CROP_FRACTION


class CorruptedImages(ImageSource):
    """The images of another source, cropped as those of ImageNet-C (224 pixels of 256) and corrupted.

    The noise of an image depends only on the seed, its index, the corruption and the severity.

    Args:
        hw: size of the model's images. If it exceeds 224 pixels, the images are still generated with 224 pixels, the
            resolution of ImageNet-C.
    """

    def __init__(self, source: ImageSource, hw: tuple[int, int], corruption: str, severity: int, seed: int):
        self.classes, self.labels = source.classes, source.labels
        factor = min(1.0, REFERENCE_SIDE / min(hw))
        self._source, self._crop = source, eval_transform((round(hw[0] * factor), round(hw[1] * factor)), CROP_FRACTION)
        self._corruption, self._severity, self._seed = corruption, severity, seed

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        return self._source.read_bytes(index)

    def encoded_size(self, index: int) -> int | None:
        return self._source.encoded_size(index)

    def read_ahead(self, indices: Sequence[int]) -> None:
        self._source.read_ahead(indices)

    def open_image(self, index: int) -> tuple[LazyImage, int]:
        image, label = self._source.open_image(index)
        clean = self._crop.pixels(image).permute(1, 2, 0).numpy()
        seed = seed_for(self._seed, "corrupt", index, self._corruption, self._severity)
        return LazyImage(corrupted_jpeg(clean, self._corruption, self._severity, np.random.default_rng(seed))), label
