"""Large-scale jitter (arXiv 2012.07177): resize an image by a random factor and crop it to at most a square, masks
included; boxes are recomputed from the cropped masks. Without masks, boxes are cropped themselves.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from addp_core.data.images import RESAMPLING, LazyTransform
from det.coco import AnnotatedImage
from det.config import Interpolation
from det.masks import Segmentation, bounding_box, to_rle

MIN_SIDE = 1.0  # pixels; smaller boxes without a mask are dropped from a crop, as masks of no pixel are


@dataclass
class DetectionSample:
    """One training image of h x w pixels, not padded, and its n objects."""

    image: Tensor  # UInt8[3,h,w]
    boxes: Tensor  # Float[n,4], left, top, right, bottom in pixels
    labels: Tensor  # Long[n]
    masks: Tensor | None  # UInt8[n,h,w], 0 or 1; None for a detector of boxes alone


@dataclass
class DetectionBatch:
    """The samples of one process, with the objects of all images concatenated; image i has `counts[i]` of them.

    Images and masks lie in the upper left corner of squares; `sizes[i]` is the (height, width) of image i.
    """

    images: Tensor  # UInt8[b,3,S,S]
    sizes: list[tuple[int, int]]
    boxes: Tensor  # Float[N,4]
    labels: Tensor  # Long[N]
    masks: Tensor | None  # UInt8[N,S,S]
    counts: list[int]
    indices: Tensor  # Long[b], into the dataset
    errors: list[tuple[str, str]]  # (name, reason) of images that could not be read

    def __len__(self) -> int:
        return len(self.counts)

    def samples(self) -> list[DetectionSample]:
        """Split the batch into images with their own objects."""
        boxes, labels = self.boxes.split(self.counts), self.labels.split(self.counts)
        masks = [None] * len(self) if self.masks is None else self.masks.split(self.counts)
        return [
            DetectionSample(image[:, :h, :w], boxes[i], labels[i], None if mask is None else mask[:, :h, :w])
            for i, (image, mask, (h, w)) in enumerate(zip(self.images, masks, self.sizes, strict=True))
        ]


def collate(
    samples: list[DetectionSample], labels: Tensor, indices: Tensor, errors: list[tuple[str, str]]
) -> DetectionBatch:
    """Build the batch of a `Stream` over a `CocoDataset`, whose image labels are all -1 and unused.

    The squares are as large as the largest side needs.
    """
    sizes = [(sample.image.shape[-2], sample.image.shape[-1]) for sample in samples]
    side = max(map(max, sizes))
    masks = [sample.masks for sample in samples]
    return DetectionBatch(
        images=torch.stack([_pad(sample.image, side) for sample in samples]),
        sizes=sizes,
        boxes=torch.cat([sample.boxes for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        masks=None if masks[0] is None else torch.cat([_pad(mask, side) for mask in masks if mask is not None]),
        counts=[len(sample.labels) for sample in samples],
        indices=indices,
        errors=errors,
    )


def _pad(image: Tensor, side: int) -> Tensor:
    """[n,h,w] -> [n,side,side], with zeros on the right and at the bottom."""
    return F.pad(image, (0, side - image.shape[-1], 0, side - image.shape[-2]))


class LargeScaleJitter(LazyTransform):
    """`AnnotatedImage` -> `DetectionSample` of at most `size` x `size` pixels. Draws from Python's `random`.

    The longer side becomes `size` times a random number from the range `scale`. An image that is larger than the square
    is cropped at a random position. Crowds are dropped. Without `masks`, the samples have boxes alone.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.1, 2.0),
        flip: bool = True,
        masks: bool = True,
        interpolation: Interpolation = "bicubic",
    ):
        self.size, self.scale, self.random_flip = size, scale, flip
        self.masks, self.interpolation = masks, interpolation

    # the dataset of the stream yields AnnotatedImage
    def sample(self, image: AnnotatedImage) -> DetectionSample:  # type: ignore[override]
        """Return the jittered image with the objects that are still visible."""
        size = self.size
        factor = size * random.uniform(*self.scale) / max(image.width, image.height)
        window = CropWindow.sample(image.width, image.height, factor, size, self.random_flip)
        hw = (window.height, window.width)
        crop = np.array(image.crop(window.box, hw[::-1], window.flip, RESAMPLING[self.interpolation]))
        pixels = torch.from_numpy(crop).permute(2, 0, 1)
        objects = [obj for obj in image.objects if not obj["iscrowd"]]
        labels = torch.tensor([obj["label"] for obj in objects], dtype=torch.long)
        if not self.masks:
            boxes = np.array([window.crop_box(obj["bbox"]) for obj in objects], dtype=np.float32).reshape(-1, 4)
            visible = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
            return DetectionSample(pixels, torch.from_numpy(boxes[visible]), labels[torch.from_numpy(visible)], None)
        masks = np.array([window.crop_mask(obj["segmentation"]) for obj in objects], np.uint8).reshape(-1, *hw)
        visible = masks.any((1, 2))
        masks = masks[visible]
        boxes = np.array([bounding_box(mask) for mask in masks], dtype=np.float32).reshape(-1, 4)
        return DetectionSample(
            pixels, torch.from_numpy(boxes), labels[torch.from_numpy(visible)], torch.from_numpy(masks)
        )


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

    def crop_box(self, box: list[float]) -> list[float]:
        """Return the edges [left, top, right, bottom] in the window of a box [x, y, width, height] on the image.

        They are cut off at the window's edges, so that a box outside has no area.
        """
        x, y, w, h = box
        left, top, right, bottom = self.box
        scale_x, scale_y = self.width / (right - left), self.height / (bottom - top)
        xs = [min(max((edge - left) * scale_x, 0.0), float(self.width)) for edge in (x, x + w)]
        ys = [min(max((edge - top) * scale_y, 0.0), float(self.height)) for edge in (y, y + h)]
        if self.flip:
            xs = [self.width - xs[1], self.width - xs[0]]
        return [xs[0], ys[0], xs[1], ys[1]]

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
