"""Large-scale jitter (arXiv 2012.07177): an image resized by 0.1 to 2, cropped or padded to a square, with its masks;
boxes are drawn anew around what is left of the masks.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from addp_core.data.images import Crop
from det.coco import ScenePicture, encode

PAD = torch.tensor(IMAGENET_DEFAULT_MEAN).mul(255).round().to(torch.uint8).view(3, 1, 1)  # about 0 once normalised


@dataclass
class Scene:
    """One training image of S x S pixels and its n objects."""

    image: Tensor  # UInt8[3,S,S]
    boxes: Tensor  # Float[n,4], left, top, right, bottom in pixels
    labels: Tensor  # Long[n]
    masks: Tensor  # UInt8[n,S,S], 0 or 1


@dataclass
class SceneBatch:
    """Scenes of one process; the objects of all images in one tensor each, `counts` says how many are whose."""

    images: Tensor  # UInt8[b,3,S,S]
    boxes: Tensor  # Float[N,4]
    labels: Tensor  # Long[N]
    masks: Tensor  # UInt8[N,S,S]
    counts: list[int]
    indices: Tensor  # Long[b], into the set
    errors: list[tuple[str, str]]  # (name, reason) of images that could not be read

    def __len__(self) -> int:
        return len(self.counts)

    def scenes(self) -> list[Scene]:
        """Each image with its own objects."""
        parts = (part.split(self.counts) for part in (self.boxes, self.labels, self.masks))
        return [Scene(*scene) for scene in zip(self.images, *parts, strict=True)]


def collate(scenes: list[Scene], labels: Tensor, indices: Tensor, errors: list[tuple[str, str]]) -> SceneBatch:
    """The batch of a `Stream` over a `CocoSet`. The images' own labels mean nothing here."""
    boxes, labels, masks = (torch.cat([getattr(s, key) for s in scenes]) for key in ("boxes", "labels", "masks"))
    counts = [len(scene.labels) for scene in scenes]
    return SceneBatch(torch.stack([s.image for s in scenes]), boxes, labels, masks, counts, indices, errors)


class ScaleJitter(Crop):
    """`ScenePicture` -> `Scene` of `size` x `size` pixels. Draws from Python's `random`.

    The longer side becomes `size` times a number from `scale`; what does not fit is cropped at a random place, what is
    missing is padded at the right and below. Crowds are left out.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.1, 2.0), flip: bool = True):
        super().__init__((size, size))
        self.scale, self.mirror = scale, flip

    def pixels(self, picture: ScenePicture) -> Scene:
        size = self.hw[0]
        factor = size * random.uniform(*self.scale) / max(picture.width, picture.height)
        place = Place.draw(picture.width, picture.height, factor, size, self.mirror)
        content = np.array(picture.crop(place.box, (place.width, place.height), place.flip))
        image = PAD.expand(3, size, size).clone()
        image[:, : place.height, : place.width] = torch.from_numpy(content).permute(2, 0, 1)
        found = [
            (thing["label"], place.mask(thing["segmentation"])) for thing in picture.objects if not thing["iscrowd"]
        ]
        found = [(label, mask) for label, mask in found if mask.any()]
        masks = np.zeros((len(found), size, size), dtype=np.uint8)
        for row, (_, mask) in zip(masks, found, strict=True):
            row[: place.height, : place.width] = mask
        boxes = np.array([extent(mask) for mask in masks], dtype=np.float32).reshape(-1, 4)
        labels = torch.tensor([label for label, _ in found], dtype=torch.long)
        return Scene(image, torch.from_numpy(boxes), labels, torch.from_numpy(masks))


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The edges (left, top, right, bottom) of the pixels that are not 0; there must be one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@dataclass(frozen=True)
class Place:
    """Which part of a picture is shown (`box`: left, top, right, bottom in its pixels), at how many pixels."""

    picture: tuple[int, int]  # width, height
    box: tuple[float, float, float, float]
    width: int
    height: int
    flip: bool

    @classmethod
    def draw(cls, width: int, height: int, factor: float, size: int, mirror: bool) -> "Place":
        """A picture resized by `factor`, and a random window of at most `size` x `size` pixels on it."""
        whole = max(1, round(width * factor)), max(1, round(height * factor))
        shown = min(whole[0], size), min(whole[1], size)
        left, top = (random.randint(0, w - s) for w, s in zip(whole, shown, strict=True))
        x, y = width / whole[0], height / whole[1]
        box = (left * x, top * y, (left + shown[0]) * x, (top + shown[1]) * y)
        return cls((width, height), box, *shown, mirror and random.random() < 0.5)

    def mask(self, segmentation: list[list[float]] | dict[str, Any]) -> np.ndarray:
        """UInt8[height,width] of an object: polygons are moved and then filled, run lengths are resized."""
        left, top, right, bottom = self.box
        if isinstance(segmentation, list):
            origin, step = np.array([left, top]), np.array([self.width / (right - left), self.height / (bottom - top)])
            moved = [((np.reshape(p, (-1, 2)) - origin) * step).ravel().tolist() for p in segmentation]
            mask = coco_mask.decode(encode(moved, self.height, self.width))
        else:
            whole = coco_mask.decode(encode(segmentation, *self.picture[::-1]))
            image = Image.fromarray(whole * 255)
            shown = image.resize((self.width, self.height), Image.Resampling.BILINEAR, box=self.box)
            mask = (np.array(shown) > 127).astype(np.uint8)
        return mask[:, ::-1] if self.flip else mask
