"""One image: decoding whatever people have to upright 8-bit RGB, and the crops of pretraining and evaluation."""

import io
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace
from addp_core.data.config import DataConfig

# What Pillow may try. Its other formats are no photographs, and one of them (EPS) starts a program.
Image.init()
FORMATS = [
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
]
EXPECTED = ".jpg, .jpeg, .png, .webp, .gif, .bmp, .tif, .tiff, .ppm, .pgm, .jp2, .avif"
IMAGE_EXTENSIONS = frozenset([*EXPECTED.split(", "), ".jpe", ".jfif", ".pbm", ".pnm", ".j2k"])
MAX_PIXELS = 178_956_970  # beyond this a file is taken for a decompression bomb: twice Pillow's own warning
WHITE = (255, 255, 255, 255)


class ImageError(Exception):
    """One image cannot be read; the message says why, without the image's name."""


@contextmanager
def wrap_image_errors() -> Iterator[None]:
    """What goes wrong while bytes are read and decoded is the image's fault: Pillow raises a dozen classes for it."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a known format") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except Exception as error:
        raise ImageError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


class LazyImage:
    """An encoded image, decoded only as far as a crop needs. `width` and `height` are those of the upright picture.

    JPEGs are decoded at 1/2, 1/4 or 1/8 where the crop still has at least twice the pixels asked for: the same to the
    eye (64 dB PSNR from the full decode) and several times faster on large photographs. Take one `crop` or one
    `image`.
    """

    def __init__(self, encoded: bytes | Image.Image, size: tuple[int, int] | None = None):
        """`encoded`: a file's bytes, or a Pillow image, perhaps a shrunk copy of one of this `size` (width, height).

        Raises `ImageError` where the header is no image's.
        """
        with wrap_image_errors():
            if isinstance(encoded, bytes):
                if not encoded:
                    raise ImageError("the file is empty")
                encoded = Image.open(io.BytesIO(encoded), formats=FORMATS)
            if encoded.width * encoded.height > MAX_PIXELS:
                raise ImageError(f"{encoded.width} x {encoded.height} pixels, more than {MAX_PIXELS}: a bomb?")
            self._image = encoded
            self._turn = TURNS.get(_orientation(encoded))
            self._stored = encoded.size[::-1] if self._turn in SIDEWAYS else encoded.size
            self.width, self.height = size or self._stored

    def decode(self) -> Image.Image:
        """The whole upright picture as 8-bit RGB."""
        with wrap_image_errors():
            image = self._image.transpose(self._turn) if self._turn is not None else self._image
            return _to_rgb(image)

    def crop(self, box: tuple[float, float, float, float], size: tuple[int, int], flip: bool = False) -> Image.Image:
        """The part (left, top, right, bottom) of the upright picture, resized bicubically to `size` (width, height)."""
        with wrap_image_errors():
            image = self._image
            left, top, right, bottom = box
            wanted = (
                math.ceil(2 * size[0] * self.width / (right - left)),
                math.ceil(2 * size[1] * self.height / (bottom - top)),
            )
            width = image.width
            reduced = image.draft(None, wanted[::-1] if self._turn in SIDEWAYS else wanted)
            scale = reduced[1][2] / width if reduced else 1.0  # exact, where sizes are rounded up
            x, y = scale * self._stored[0] / self.width, scale * self._stored[1] / self.height
            if self._turn is not None:
                image = image.transpose(self._turn)
            if image.mode not in ("RGB", "L") or "transparency" in image.info:
                image = _to_rgb(image)
            image = image.resize(size, Image.Resampling.BICUBIC, box=(left * x, top * y, right * x, bottom * y))
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return image.convert("RGB")


TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[5], TURNS[6], TURNS[7], TURNS[8]}


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF beside sound pixels: the picture as it is stored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: 16 bits scaled to 8, transparency laid on white, CMYK and palettes converted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)  # 0..65535; Pillow's own conversion would clip at 255
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("32-bit greyscale has no fixed range: save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


class Crop:
    """One crop, one resize, perhaps a mirror image. Called with a Pillow image or a `LazyImage` -> Float[3,h,w] in [0,1].

    A `Stream` calls `pixels` instead, so that a picture is decoded no further than its crop needs and travels as bytes.
    """

    def __init__(self, hw: tuple[int, int]):
        self.hw = hw

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the crop from an image of this size."""
        raise NotImplementedError

    def flip(self) -> bool:
        return False

    def pixels(self, picture: LazyImage) -> Tensor:
        """UInt8[3,h,w]."""
        box = self.box(picture.width, picture.height)
        image = picture.crop(box, self.hw[::-1], self.flip())
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __call__(self, image: Image.Image | LazyImage) -> Tensor:
        picture = image if isinstance(image, LazyImage) else LazyImage(image)
        return self.pixels(picture).contiguous().float().div_(255)


class RandomCrop(Crop):
    """A crop of random area and shape (Inception's, as in MAE), mirrored by chance. Draws from Python's `random`."""

    def __init__(
        self,
        hw: tuple[int, int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        flip: bool = True,
    ):
        super().__init__(hw)
        self.scale, self.ratio, self.mirror = scale, ratio, flip

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        shape = self.hw[1] / self.hw[0]
        for _ in range(10):
            area = width * height * random.uniform(*self.scale)
            ratio = shape * math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if w <= width and h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return _central(width, height, shape)

    def flip(self) -> bool:
        return self.mirror and random.random() < 0.5


class CenterCrop(Crop):
    """The largest central part of the target's shape, or `share` of its sides: shorter side resized, centre cropped."""

    def __init__(self, hw: tuple[int, int], share: float = 1.0):
        super().__init__(hw)
        self.share = share

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        return _central(width, height, self.hw[1] / self.hw[0], self.share)


def _central(width: int, height: int, shape: float, share: float = 1.0) -> tuple[float, float, float, float]:
    """The largest box of this width / height in the middle, its sides times `share`."""
    w, h = min(width, height * shape) * share, min(height, width / shape) * share
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def pretrain_transform(config: DataConfig) -> RandomCrop:
    """Random crop and mirror of pretraining (App. D: area 0.2-1, bicubic) -> Float[3,h,w] in [0,1], not normalised."""
    return RandomCrop(config.hw, config.scale, config.ratio, config.flip)


def eval_transform(size: int | tuple[int, int], share: float = 1.0) -> CenterCrop:
    """Centre crop -> Float[3,h,w] in [0,1]. `share` 0.875 with size 224 is the usual resize to 256, crop to 224."""
    return CenterCrop((size, size) if isinstance(size, int) else tuple(size), share)


def write_png(image: Image.Image, path: Path) -> None:
    """A PNG that is whole or absent, its folders too. UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as temporary:
            image.save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room and start again") from error
