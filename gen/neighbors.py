"""The images of a dataset that are nearest to another one in the features of an encoder."""

from collections.abc import Iterator

import torch
from torch import Tensor

from addp_core.data.image_source import ImageSource
from addp_core.data.images import ImageError, eval_transform
from gen.encoder_figures import BATCH, EncoderView


class ImagePool:
    """Images of a dataset, spread over it, and their descriptors, which are computed when they are first asked for."""

    def __init__(self, view: EncoderView, source: ImageSource, count: int):
        self.view, self.source = view, source
        self._waiting = torch.linspace(0, len(source) - 1, min(count, len(source))).long().tolist()
        self._crop = eval_transform(view.encoder.image_size)
        self.indices: list[int] = []  # of the readable images so far
        self._descriptors: list[Tensor] = []

    def __len__(self) -> int:
        """Return how many images there will be, readable or not."""
        return len(self.indices) + len(self._waiting)

    def describe(self) -> Iterator[int]:
        """Compute the descriptors that are missing; yield how many there are after each batch. May be given up."""
        while self._waiting:
            numbers, images = [], []
            for index in self._waiting[:BATCH]:
                try:
                    images.append(self._crop(self.source.open_image(index)[0]))
                except ImageError:
                    continue
                numbers.append(index)
            if images:
                self._descriptors.append(self.view.descriptors(torch.stack(images)))
            self.indices += numbers
            del self._waiting[:BATCH]
            yield len(self.indices)

    def nearest(self, descriptor: Tensor, count: int) -> list[tuple[int, float]]:
        """Return the indices of the nearest images and the cosines. descriptor: Float[W] of length 1."""
        if not self.indices:
            return []
        similarities, order = (torch.cat(self._descriptors) @ descriptor).sort(descending=True)
        return [(self.indices[i], float(similarities[n])) for n, i in enumerate(order[:count].tolist())]

    def image(self, index: int) -> Tensor:
        """Return an image as the encoder sees it, Float[3,H,W] in [0,1]. Raises ImageError."""
        return self._crop(self.source.open_image(index)[0])
