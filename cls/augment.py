"""timm's training augmentation on images that are decoded no further than its random crop needs."""

import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose

from addp_core.data.images import LazyImage, LazyTransform
from addp_core.data.stream import seed_cpu


class CroppedFirst(LazyTransform):
    """A training transform of timm whose random crop is cut out and resized by torch; the rest is timm's.

    The random numbers are those of timm's transform, in the same order.

    Args:
        transform: of `timm.data.create_transform`; it begins with the random crop.
    """

    def __init__(self, transform: Compose):
        crop, *rest = transform.transforms
        assert isinstance(crop, RandomResizedCropAndInterpolation)
        self.crop, self.rest = crop, Compose(rest)

    def seed(self, seed: int) -> None:
        """Seed Python's random, numpy and torch: RandAugment, jitter and random erasing draw from all of them."""
        seed_cpu(seed)

    def sample(self, image: LazyImage) -> Tensor:
        """Return the augmented image, Float[3,h,w], normalized."""
        size_only = torch.empty(1, image.height, image.width, device="meta")
        top, left, height, width = self.crop.get_params(size_only, self.crop.scale, self.crop.ratio)
        box = (left, top, left + width, top + height)
        pixels = image.crop_pixels(box, self.crop.size[::-1], "bicubic", "torch")
        return self.rest(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
