"""Draws detections on images: boxes, masks, category names and scores."""

import colorsys

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from addp_core.base.fonts import find_font
from det.config import Category, distinct_names
from det.model import Detections

MASK_OPACITY = 0.45


def draw_detections(
    image: Tensor,
    detections: Detections,
    categories: tuple[Category, ...],
    min_score: float = 0.5,
    max_objects: int = 100,
) -> Tensor:
    """UInt8[3,H,W] -> UInt8[3,H,W] with the `max_objects` highest-scoring detections of at least `min_score`."""
    kept = [i for i, score in enumerate(detections.scores[:max_objects].tolist()) if score >= min_score]
    if not kept:
        return image
    labels = [int(detections.labels[i]) for i in kept]
    colors = [_color(label) for label in labels]
    if detections.masks is not None:
        masks = torch.stack([detections.mask(i) for i in kept])
        image = draw_segmentation_masks(image, masks, alpha=MASK_OPACITY, colors=colors)
    names = distinct_names(categories)
    texts = [f"{names[label]} {detections.scores[i]:.2f}" for i, label in zip(kept, labels, strict=True)]
    font = find_font("".join(sorted({character for name in names for character in name})))
    line_width = max(1, round(max(image.shape) / 300))
    return draw_bounding_boxes(image, detections.boxes[kept].cpu(), texts, colors, width=line_width, font=font)


def fit_to_square(image: Tensor, size: int) -> Tensor:
    """UInt8[3,H,W] -> Float[3,size,size] in [0,1]: the longer side is resized to `size`, the rest is white."""
    factor = size / max(image.shape)
    hw = [max(1, round(side * factor)) for side in image.shape[-2:]]
    small = F.interpolate(image[None].float() / 255, hw, mode="bilinear", antialias=True)[0]
    return F.pad(small, (0, size - hw[1], 0, size - hw[0]), value=1.0)


def _color(label: int) -> tuple[int, int, int]:
    """Return an RGB color. Hues advance by the golden ratio, so that neighboring labels are easy to tell apart."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
