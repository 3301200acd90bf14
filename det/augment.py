"""Large-scale jitter (arXiv 2012.07177): resize an image by a random factor and crop or pad it to a square, masks
included; boxes are recomputed from the cropped masks.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from addp_core.data.images import Crop
from det.coco import AnnotatedImage
from det.masks import Segmentation, bounding_box, to_rle

PADDING = torch.tensor(IMAGENET_DEFAULT_MEAN).mul(255).round().to(torch.uint8).view(3, 1, 1)  # about 0 once normalized


@dataclass
class DetectionSample:
    """One training image of S x S pixels and its n objects."""

    image: Tensor  # UInt8[3,S,S]
    boxes: Tensor  # Float[n,4], left, top, right, bottom in pixels
    labels: Tensor  # Long[n]
    masks: Tensor  # UInt8[n,S,S], 0 or 1


@dataclass
class DetectionBatch:
    """The samples of one process, with the objects of all images concatenated; image i has `counts[i]` of them."""

    images: Tensor  # UInt8[b,3,S,S]
    boxes: Tensor  # Float[N,4]
    labels: Tensor  # Long[N]
    masks: Tensor  # UInt8[N,S,S]
    counts: list[int]
    indices: Tensor  # Long[b], into the dataset
    errors: list[tuple[str, str]]  # (name, reason) of images that could not be read

    def __len__(self) -> int:
        return len(self.counts)

    def samples(self) -> list[DetectionSample]:
        """Split the batch into images with their own objects."""
        parts = (part.split(self.counts) for part in (self.boxes, self.labels, self.masks))
        return [DetectionSample(*sample) for sample in zip(self.images, *parts, strict=True)]


def collate(
    samples: list[DetectionSample], labels: Tensor, indices: Tensor, errors: list[tuple[str, str]]
) -> DetectionBatch:
    """Build the batch of a `Stream` over a `CocoDataset`, whose image labels are all -1 and unused."""
    return DetectionBatch(
        images=torch.stack([sample.image for sample in samples]),
        boxes=torch.cat([sample.boxes for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        masks=torch.cat([sample.masks for sample in samples]),
        counts=[len(sample.labels) for sample in samples],
        indices=indices,
        errors=errors,
    )


class LargeScaleJitter(Crop):
    """`AnnotatedImage` -> `DetectionSample` of `size` x `size` pixels. Draws from Python's `random`.

    The longer side becomes `size` times a random number from the range `scale`. An image that is larger than the square
    is cropped at a random position, a smaller one is padded on the right and at the bottom. Crowds are dropped.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.1, 2.0), flip: bool = True):
        super().__init__((size, size))
        self.scale, self.random_flip = scale, flip

    # the dataset of the stream yields AnnotatedImage, and `collate` takes the samples
    def pixels(self, image: AnnotatedImage) -> DetectionSample:  # type: ignore[override]
        """Return the jittered image with the objects that are still visible."""
        size = self.hw[0]
        factor = size * random.uniform(*self.scale) / max(image.width, image.height)
        window = CropWindow.sample(image.width, image.height, factor, size, self.random_flip)
        crop = np.array(image.crop(window.box, (window.width, window.height), window.flip))
        square = PADDING.expand(3, size, size).clone()
        square[:, : window.height, : window.width] = torch.from_numpy(crop).permute(2, 0, 1)
        objects = [obj for obj in image.objects if not obj["iscrowd"]]
        cropped = [(obj["label"], window.crop_mask(obj["segmentation"])) for obj in objects]
        visible = [(label, mask) for label, mask in cropped if mask.any()]
        masks = np.zeros((len(visible), size, size), dtype=np.uint8)
        for padded, (_, mask) in zip(masks, visible, strict=True):
            padded[: window.height, : window.width] = mask
        boxes = np.array([bounding_box(mask) for mask in masks], dtype=np.float32).reshape(-1, 4)
        labels = torch.tensor([label for label, _ in visible], dtype=torch.long)
        return DetectionSample(square, torch.from_numpy(boxes), labels, torch.from_numpy(masks))


@dataclass(frozen=True)
class CropWindow:
    """A part of an image and the size that it is resized to."""

    image_size: tuple[int, int]  # width, height
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
    width: int  # of the resized part
    height: int
    flip: bool

    @classmethod
    def sample(cls, width: int, height: int, factor: float, size: int, random_flip: bool) -> "CropWindow":
        """Draw a window of at most `size` x `size` pixels on an image that is resized by `factor`."""
        resized = max(1, round(width * factor)), max(1, round(height * factor))
        window = min(resized[0], size), min(resized[1], size)
        left, top = (random.randint(0, full - part) for full, part in zip(resized, window, strict=True))
        x, y = width / resized[0], height / resized[1]
        box = (left * x, top * y, (left + window[0]) * x, (top + window[1]) * y)
        return cls((width, height), box, *window, random_flip and random.random() < 0.5)

    def crop_mask(self, segmentation: Segmentation) -> np.ndarray:
        """Return an object's mask in the window, UInt8[height,width].

        Polygons are moved and then filled; run lengths are decoded and resized.
        """
        left, top, right, bottom = self.box
        if isinstance(segmentation, list):
            origin = np.array([left, top])
            scale = np.array([self.width / (right - left), self.height / (bottom - top)])
            moved = [((np.reshape(polygon, (-1, 2)) - origin) * scale).ravel().tolist() for polygon in segmentation]
            mask = coco_mask.decode(to_rle(moved, self.height, self.width))
        else:
            full = Image.fromarray(coco_mask.decode(to_rle(segmentation, *self.image_size[::-1])) * 255)
            resized = full.resize((self.width, self.height), Image.Resampling.BILINEAR, box=self.box)
            mask = (np.array(resized) > 127).astype(np.uint8)
        return mask[:, ::-1] if self.flip else mask
