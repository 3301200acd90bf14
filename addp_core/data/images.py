"""One image: decoding of common formats to upright 8-bit RGB, and the crops of pretraining and evaluation."""

import io
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.data.config import DEFAULT_RESIZE, DataConfig, Resize
from addp_core.data.config import Interpolation as Interpolation
from addp_core.data.pixels import decode_jpeg, resize_part, to_float

# The formats that Pillow may try. Its other formats are no photographs, and one of them (EPS) starts a program.
Image.init()
FORMATS: list[str] = [
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
]
COMMON_EXTENSIONS = ".jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .tiff, .ppm, .pgm, .jp2, .avif"  # for messages
IMAGE_EXTENSIONS = frozenset([*COMMON_EXTENSIONS.split(", "), ".jpe", ".jfif", ".pbm", ".pnm", ".j2k"])
MAX_PIXELS = 178_956_970  # larger images are taken for decompression bombs; Pillow warns at half of this
OPAQUE_WHITE = (255, 255, 255, 255)

EXIF_ORIENTATION = 0x0112
TIFF_PHOTOMETRIC, TIFF_MIN_IS_WHITE = 262, 0
ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # what Pillow's getexif reads
TRANSPOSES = {  # value of the EXIF orientation -> operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = {TRANSPOSES[5], TRANSPOSES[6], TRANSPOSES[7], TRANSPOSES[8]}

Box = tuple[float, float, float, float]  # left, top, right, bottom
RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


class ImageError(Exception):
    """One image cannot be read. The message gives the reason but not the image's name."""


@contextmanager
def wrap_image_errors() -> Iterator[None]:
    """Turn any error from reading and decoding an image into an `ImageError`: Pillow raises a dozen classes.

    A `UserError` stays one: it says that not this image but the whole dataset cannot be read.
    """
    try:
        yield
    except (ImageError, MemoryError, UserError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a known format") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except Exception as error:
        raise ImageError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


class LazyImage:
    """An encoded image that is decoded only as far as a crop needs.

    `width` and `height` are those of the upright image. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop
    then still has at least twice the requested pixels per side: the difference is invisible (64 dB PSNR to the full
    decode), and large photographs are several times faster. Call `crop` or `decode` once.
    """

    def __init__(self, encoded: bytes | Image.Image, size: tuple[int, int] | None = None):
        """Read the header; raises `ImageError` if it is not that of an image.

        Args:
            encoded: the bytes of a file, or a Pillow image.
            size: width and height of the original, if the Pillow image is a downscaled copy.
        """
        file = encoded if isinstance(encoded, bytes) else None
        with wrap_image_errors():
            if isinstance(encoded, bytes):
                if not encoded:
                    raise ImageError("the file is empty")
                encoded = Image.open(io.BytesIO(encoded), formats=FORMATS)
            self._encoded = file
            if encoded.width * encoded.height > MAX_PIXELS:
                raise ImageError(
                    f"{encoded.width} x {encoded.height} pixels, more than the limit of {MAX_PIXELS} pixels: "
                    "is it a decompression bomb?"
                )
            self._image = encoded
            self._transpose = TRANSPOSES.get(_orientation(encoded))
            self._white_is_zero = _white_is_zero(encoded)
            if encoded.format == "TIFF" and self._transpose is not None:
                # Pillow itself turns TIFFs, when they are loaded, and deletes the orientation; older versions do not.
                encoded.load()
                self._transpose = TRANSPOSES.get(_orientation(encoded))
            self._decoded_size = encoded.size[::-1] if self._transpose in SWAPS_SIDES else encoded.size
            self.width, self.height = size or self._decoded_size

    def decode(self) -> Image.Image:
        """Return the whole upright image as 8-bit RGB."""
        with wrap_image_errors():
            if self._transpose is None:
                return _to_rgb(self._image, self._white_is_zero)
            upright = _to_rgb(self._image.transpose(self._transpose), self._white_is_zero)
            for key in ORIENTATION_SOURCES:  # Pillow keeps them, and who reads this image would turn it again
                upright.info.pop(key, None)
            return upright

    def pixels(self) -> Tensor:
        """Return the whole upright image as UInt8[3,h,w] with channels last in memory: the pixels of `decode`, sooner.

        JPEGs are decoded by torchvision, unless they are turned, CMYK or damaged, and all others by Pillow.
        """
        image = self._image
        if self._encoded and image.format == "JPEG" and image.mode in ("RGB", "L") and self._transpose is None:
            decoded = decode_jpeg(self._encoded)
            if decoded is not None:
                return decoded
        return _as_tensor(self.decode())

    def crop(
        self,
        box: Box,
        size: tuple[int, int],
        flip: bool = False,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> Image.Image:
        """Return a part of the upright image, resized to `size` (width, height), as 8-bit RGB."""
        with wrap_image_errors():
            return self._resize(self._reduce(box, size), size, flip, resample)

    def _resize(self, box: Box, size: tuple[int, int], flip: bool, resample: Image.Resampling) -> Image.Image:
        """Return `crop`'s result for a box in pixels of the size at which the image is decoded."""
        image = self._image
        if self._transpose is not None:
            image = image.transpose(self._transpose)
        if image.mode not in ("RGB", "L") or "transparency" in image.info:
            image = _to_rgb(image, self._white_is_zero)
        image = image.resize(size, resample, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.convert("RGB")

    def crop_pixels(
        self, box: Box, size: tuple[int, int], interpolation: Interpolation = "bicubic", resize: Resize = "pillow"
    ) -> Tensor:
        """Return a part of the upright image, resized to `size` (width, height), as UInt8[3,h,w].

        With resize="torch", the part is cut out and resized by torch, unless the image is decoded at a reduced size or
        the box does not lie on whole pixels. Pillow's resize also weighs in pixels just outside of the box.
        """
        with wrap_image_errors():
            scaled = self._reduce(box, size)
            whole = (int(box[0]), int(box[1]), int(box[2]), int(box[3]))
            if resize == "torch" and whole == box == scaled:
                return resize_part(self.pixels(), whole, size, interpolation)
            return _as_tensor(self._resize(scaled, size, False, RESAMPLING[interpolation]))

    def _reduce(self, box: Box, size: tuple[int, int]) -> Box:
        """Have a JPEG decoded at the smallest size that suffices for a crop; return the box in pixels of that size."""
        image = self._image
        left, top, right, bottom = box
        enough = (
            math.ceil(2 * size[0] * self.width / (right - left)),
            math.ceil(2 * size[1] * self.height / (bottom - top)),
        )
        width = image.width
        draft = image.draft(None, enough[::-1] if self._transpose in SWAPS_SIDES else enough)
        scale = draft[1][2] / width if draft else 1.0  # exact even where the reduced size is rounded up
        x, y = scale * self._decoded_size[0] / self.width, scale * self._decoded_size[1] / self.height
        return left * x, top * y, right * x, bottom * y


def _as_tensor(image: Image.Image) -> Tensor:
    """Pillow RGB image -> UInt8[3,h,w] with channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF data beside intact pixels: use the image as it is stored
        return 1


def _white_is_zero(image: Image.Image) -> bool:
    """Check for a 16-bit TIFF whose 0 is white: Pillow inverts 8 bits itself, but not 16."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I;16") and tags.get(TIFF_PHOTOMETRIC) == TIFF_MIN_IS_WHITE


def _to_rgb(image: Image.Image, white_is_zero: bool = False) -> Image.Image:
    """Convert any mode to 8-bit RGB: 16 bits are scaled to 8, transparency is put on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)  # 0 to 65535; Pillow's own conversion would clip at 255
        values = 65535 - values if white_is_zero else values
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("32-bit grayscale has no fixed range: save the image with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, OPAQUE_WHITE), image).convert("RGB")
    return image.convert("RGB")


class Cut(NamedTuple):
    """The pixels of a crop, and whether they are still to be mirrored, which the device does."""

    pixels: Tensor  # UInt8[3,h,w], channels last in memory
    mirrored: bool


class LazyTransform:
    """A transform that a `Stream` calls with an image of which only the header is decoded."""

    def seed(self, seed: int) -> None:
        """Seed what `sample` draws from, which the stream does for each image: Python's `random`."""
        random.seed(seed)

    def sample(self, image: LazyImage) -> Any:
        """Return the sample of an image, of which the stream's `collate` makes batches."""
        raise NotImplementedError


class Crop(LazyTransform):
    """A crop, a resize and possibly a horizontal flip: a Pillow image or a `LazyImage` -> Float[3,h,w] in [0,1].

    A `Stream` calls `sample` instead: an image is decoded no further than its crop needs, workers send bytes, and the
    device mirrors them.

    Args:
        hw: height and width of the result.
        interpolation: of the resize.
        resize: what resizes; see `LazyImage.crop_pixels`.
    """

    def __init__(self, hw: tuple[int, int], interpolation: Interpolation = "bicubic", resize: Resize = "pillow"):
        self.hw, self.interpolation, self.resize = hw, interpolation, resize

    def box(self, width: int, height: int) -> Box:
        """Return the crop's (left, top, right, bottom) in an image of this size."""
        raise NotImplementedError

    def flip(self) -> bool:
        """Return whether to mirror the crop."""
        return False

    def sample(self, image: LazyImage) -> Cut:
        """Return the crop, not yet mirrored."""
        box = self.box(image.width, image.height)
        mirrored = self.flip()
        return Cut(image.crop_pixels(box, self.hw[::-1], self.interpolation, self.resize), mirrored)

    def pixels(self, image: LazyImage) -> Tensor:
        """Return the crop as UInt8[3,h,w] with channels last in memory."""
        pixels, mirrored = self.sample(image)
        return pixels.flip(-1) if mirrored else pixels

    def __call__(self, image: Image.Image | LazyImage) -> Tensor:
        """Return the crop as Float[3,h,w] in [0,1]."""
        lazy = image if isinstance(image, LazyImage) else LazyImage(image)
        return to_float(self.pixels(lazy)[None])[0]


class RandomCrop(Crop):
    """A crop of random area and aspect ratio (Inception's, as in MAE), flipped with probability 1/2.

    It draws from Python's `random`. scale: range of the area, as a fraction of the image's. ratio: range of the aspect
    ratio, relative to that of `hw`.
    """

    def __init__(
        self,
        hw: tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        flip: bool = True,
        interpolation: Interpolation = "bicubic",
        resize: Resize = "pillow",
    ):
        super().__init__(hw, interpolation, resize)
        self.scale, self.ratio, self.may_flip = scale, ratio, flip

    def box(self, width: int, height: int) -> Box:
        """Draw the crop's box; if ten boxes do not fit into the image, return the largest central one."""
        aspect = self.hw[1] / self.hw[0]
        for _ in range(10):
            area = width * height * random.uniform(*self.scale)
            ratio = aspect * math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if w <= width and h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return _center_box(width, height, aspect)

    def flip(self) -> bool:
        """Draw whether to mirror the crop."""
        return self.may_flip and random.random() < 0.5


class CenterCrop(Crop):
    """The central crop of the target's aspect ratio whose sides are `fraction` of the largest possible."""

    def __init__(self, hw: tuple[int, int], fraction: float = 1.0):
        super().__init__(hw)
        self.fraction = fraction

    def box(self, width: int, height: int) -> Box:
        """Return the central box."""
        return _center_box(width, height, self.hw[1] / self.hw[0], self.fraction)


def _center_box(width: int, height: int, aspect: float, fraction: float = 1.0) -> Box:
    """Return the largest central box of this width / height, with its sides multiplied by `fraction`."""
    w, h = min(width, height * aspect) * fraction, min(height, width / aspect) * fraction
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def pretrain_transform(config: DataConfig, interpolation: Interpolation = "bicubic") -> RandomCrop:
    """Return the random crop and flip of pretraining (App. D: area 0.2-1, bicubic) -> Float[3,h,w] in [0,1]."""
    resize = config.resize or DEFAULT_RESIZE
    return RandomCrop(config.hw, config.scale, config.ratio, config.flip, interpolation, resize)


def eval_transform(size: int | tuple[int, int], fraction: float = 1.0) -> CenterCrop:
    """Return the center crop of evaluation -> Float[3,h,w] in [0,1].

    size: one side, or height and width. fraction: 0.875 with size 224 is the usual resize to 256 and crop to 224.
    """
    return CenterCrop((size, size) if isinstance(size, int) else (size[0], size[1]), fraction)


def write_png(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically and create its folders; raises `UserError` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as temporary:
            image.save(temporary, format="PNG")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free some disk space and start again") from error
