"""Pictures with boxes, masks, names and scores drawn on them."""

import colorsys

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from det.config import Category
from det.model import Detections

OPACITY = 0.45  # of a mask


def draw(
    image: Tensor, found: Detections, categories: tuple[Category, ...], score: float = 0.5, most: int = 100
) -> Tensor:
    """UInt8[3,H,W] and what was found on it -> UInt8[3,H,W] with what is at least this sure, the `most` surest."""
    shown = [i for i, value in enumerate(found.scores[:most].tolist()) if value >= score]
    if not shown:
        return image
    labels = [int(found.labels[i]) for i in shown]
    colours = [_colour(label) for label in labels]
    masks = torch.stack([found.pixels(i) for i in shown])
    image = draw_segmentation_masks(image, masks, alpha=OPACITY, colors=colours)
    texts = [f"{categories[label].name} {found.scores[i]:.2f}" for i, label in zip(shown, labels, strict=True)]
    width = max(1, round(max(image.shape) / 300))
    return draw_bounding_boxes(image, found.boxes[shown].cpu(), texts, colours, width=width)


def square(image: Tensor, size: int) -> Tensor:
    """UInt8[3,H,W] -> Float[3,size,size] in [0,1]: the longer side resized to `size`, the rest white."""
    factor = size / max(image.shape)
    hw = [max(1, round(side * factor)) for side in image.shape[-2:]]
    small = F.interpolate(image[None].float() / 255, hw, mode="bilinear", antialias=True)[0]
    return F.pad(small, (0, size - hw[1], 0, size - hw[0]), value=1.0)


def _colour(label: int) -> tuple[int, int, int]:
    """Colours far apart for neighbouring labels: hues by the golden ratio."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 1.0))
