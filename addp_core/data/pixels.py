"""8-bit pixels as tensors: fast decoding of JPEGs, resizing of crops, batches, and their conversion on the device.

Tensors have the shape UInt8[...,3,h,w] and, in memory, channels last, as decoders write them: nothing is transposed
before the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate

try:  # torchvision 0.29 announces that its decoders will go
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as torchvision_decode_jpeg
except ImportError:
    torchvision_decode_jpeg = None


def decode_jpeg(encoded: bytes) -> Tensor | None:
    """Return the pixels of an RGB or grayscale JPEG as RGB, UInt8[3,h,w], or None if torchvision cannot decode it.

    They are those of Pillow, which decodes with the same library.
    """
    if torchvision_decode_jpeg is None:
        return None
    try:
        return torchvision_decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:  # a damaged file, or a rare kind: Pillow reads it, or says what is wrong
        return None


def resize_part(
    image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str = "bicubic"
) -> Tensor:
    """Cut out a part of an image and resize it, with antialiasing: UInt8[3,h,w] -> UInt8[3,height,width].

    Args:
        image: with channels last in memory.
        box: left, top, right and bottom of the part. Pixels outside do not contribute.
        size: width and height of the result.
        interpolation: "bicubic" or "bilinear".
    """
    left, top, right, bottom = box
    # Of a batch of one, torch finds out that channels are last only if the batch's stride says so as well.
    part = image.permute(1, 2, 0)[top:bottom, left:right].unsqueeze(0).permute(0, 3, 1, 2)
    return interpolate(part, size[::-1], mode=interpolation, align_corners=False, antialias=True)[0]


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Stack images with channels last in memory: UInt8[3,h,w] of each -> UInt8[b,3,h,w].

    In a data loading process, the result lies in memory that it shares with the training process.
    """
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def to_float(pixels: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Convert pixels to Float[b,3,h,w] in [0,1], contiguous, on their own device.

    Args:
        pixels: UInt8[b,3,h,w].
        mirrored: Bool[b], which images to mirror horizontally.
    """
    if mirrored is not None:
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
