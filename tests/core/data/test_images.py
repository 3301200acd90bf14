"""Decoding of all common formats, and crops."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_data import QUICK, encode, noise_image, smooth_image
from PIL import Image, ImageOps

from addp_core.data.images import CenterCrop, ImageError, LazyImage, RandomCrop, eval_transform


def corner_image(width: int = 24, height: int = 16) -> Image.Image:
    """Return an image that none of the eight EXIF orientations maps to itself."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    image.paste((0, 255, 0), (width - 8, 0, width, 8))
    image.paste((0, 0, 255), (0, height - 8, 8, height))
    return image


def decode_rgb(encoded: bytes) -> np.ndarray:
    image = LazyImage(encoded).decode()
    assert image.mode == "RGB"
    return np.asarray(image)


def test_16_bit_grayscale_is_scaled_not_clipped():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for kind in ("PNG", "TIFF"):
        found = decode_rgb(encode(Image.fromarray(values), kind))
        assert (found == (values // 257)[..., None]).all()
    between = np.array([[0, 128, 129, 300, 65535, 65407]], dtype=np.uint16)
    assert decode_rgb(encode(Image.fromarray(between)))[0, :, 0].tolist() == [0, 0, 1, 1, 255, 255]


def test_tiff_whose_zero_is_white():
    for kind in (np.uint8, np.uint16):
        values = (np.arange(256).reshape(16, 16) * (1 if kind is np.uint8 else 257)).astype(kind)
        encoded = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
        # Pillow writes the tag for 16 bits without inverting the values, but inverts 8 bits when it writes and reads.
        expected = np.arange(256).reshape(16, 16) if kind is np.uint8 else 255 - np.arange(256).reshape(16, 16)
        assert (decode_rgb(encoded)[..., 0] == expected).all()
    crop = eval_transform(8)(LazyImage(encode(Image.fromarray(np.zeros((9, 9), np.uint16)), "TIFF", tiffinfo={262: 0})))
    assert crop.min() == 1


def test_16_bit_grayscale_through_a_crop():
    values = np.full((20, 20), 30000, dtype=np.uint16)
    image = eval_transform(8)(LazyImage(encode(Image.fromarray(values))))
    assert torch.allclose(image, torch.full((3, 8, 8), 30000 / 65535), atol=0.5 / 255)


def test_cmyk_is_converted_to_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode_rgb(encode(image, "JPEG", quality=95)).astype(int) - (255, 0, 0)).max() < 12
    crop = eval_transform(8)(LazyImage(encode(image, "JPEG", quality=95)))
    assert torch.allclose(crop.mean((1, 2)), torch.tensor([1.0, 0, 0]), atol=0.05)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert decode_rgb(encode(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert decode_rgb(encode(image, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert decode_rgb(encode(image, transparency=bytes([255, 0]))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert decode_rgb(encode(image, "GIF", transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
    ],
)
def test_modes_and_transparency_on_white(mode, color, expected):
    encoded = encode(Image.new(mode, (9, 9), color))
    assert np.abs(decode_rgb(encoded).astype(int) - expected).max() <= 1
    crop = eval_transform(8)(LazyImage(encoded)) * 255
    assert torch.allclose(crop.mean((1, 2)), torch.tensor(expected, dtype=torch.float32), atol=1)


def test_transparent_color_of_gray_and_rgb_images():
    assert decode_rgb(encode(Image.new("L", (4, 4), 9), transparency=9)).min() == 255
    assert decode_rgb(encode(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(corner_image(), kind, exif=exif, **options)
    # Pillow turns TIFFs when it loads them, so the reference for a TIFF is a PNG.
    reference = encode(corner_image(), exif=exif) if kind == "TIFF" else encoded
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(reference))).convert("RGB"))
    image = LazyImage(encoded)
    assert (image.height, image.width) == expected.shape[:2]
    decoded = image.decode()
    assert (np.asarray(decoded) == expected).all()
    assert (np.asarray(LazyImage(decoded).decode()) == expected).all()  # an upright image is not turned again
    top, right = 2, expected.shape[1] - 3  # a box away from the center shows whether the box is transposed too
    crop = np.asarray(LazyImage(encoded).crop((right - 5, top, right, top + 4), (5, 4)))
    assert (crop == expected[top : top + 4, right - 5 : right]).all()


def test_orientation_with_a_reduced_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    big = corner_image(24, 16).resize((960, 640), Image.Resampling.NEAREST)
    image = LazyImage(encode(big, "JPEG", exif=exif, quality=95))
    assert (image.width, image.height) == (640, 960)
    small = np.asarray(image.crop((0, 0, 640, 960), (16, 24))).astype(int)
    expected = np.asarray(corner_image(24, 16).transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(small - expected)[2:6, 2:6].max() < 20  # inside a corner: blue is at the top left now
    assert np.abs(small - expected).mean() < 12


def test_broken_exif_data_is_ignored():
    encoded = encode(smooth_image(20, 20), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert LazyImage(encoded).decode().size == (20, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_errors(kind, fraction):
    encoded = encode(noise_image(64, 48), kind)
    truncated = encoded[: int(len(encoded) * fraction)]
    with pytest.raises(ImageError):
        LazyImage(truncated).decode()
    with pytest.raises(ImageError):
        eval_transform(8)(LazyImage(truncated))


def test_truncated_progressive_jpeg_and_reduced_decoding():
    encoded = encode(noise_image(600, 500), "JPEG", progressive=True)
    with pytest.raises(ImageError, match="truncated"):
        eval_transform(16)(LazyImage(encoded[: len(encoded) * 2 // 3]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"just text, no image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would start Ghostscript
        (b"\xff\xd8\xff\xe0", "not an image"),
    ],
)
def test_files_that_are_no_images_are_rejected_with_a_reason(content, reason):
    with pytest.raises(ImageError, match=reason):
        LazyImage(content)


def test_decompression_bomb():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError, match="bomb"):
        LazyImage(bomb)


def test_32_bit_grayscale_is_an_error():
    with pytest.raises(ImageError, match="32-bit"):
        LazyImage(encode(Image.new("F", (9, 9), 0.5), "TIFF")).decode()


@QUICK
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), st.data())
def test_damaged_files_give_an_image_or_an_image_error(kind, data):
    encoded = bytearray(encode(smooth_image(24, 20), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    for read in (lambda: LazyImage(bytes(encoded)).decode(), lambda: eval_transform(8)(LazyImage(bytes(encoded)))):
        reason = None
        try:
            read()
        except ImageError as error:
            reason = str(error)
        assert reason != ""


@QUICK
@given(
    st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 10**6), st.tuples(st.integers(8, 64), st.integers(8, 64))
)
def test_random_crops_lie_inside_and_have_the_right_area(width, height, seed, hw):
    random.seed(seed)
    left, top, right, bottom = RandomCrop(hw).box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 100 and max(width, height) < 2 * min(width, height) and hw[0] == hw[1]:
        assert 0.19 <= (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.7 <= (right - left) / (bottom - top) <= 1.4


@pytest.mark.parametrize("hw", [(16, 16), (24, 8), (8, 40)])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (50, 40)])
def test_crops_work_for_any_size_of_image_and_target(hw, size):
    for transform in (RandomCrop(hw), CenterCrop(hw)):
        image = transform(noise_image(*size))
        assert image.shape == (3, *hw)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert 0 <= image.min() <= image.max() <= 1


def test_eval_transform_is_resize_then_center_crop():
    image = smooth_image(80, 60)
    expected = image.resize((32, 24), Image.Resampling.BICUBIC).crop((4, 0, 28, 24))
    found = eval_transform(24)(image)
    assert (found - torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255).abs().max() <= 2 / 255
    assert CenterCrop((24, 48)).box(80, 60) == (0, 10, 80, 50)
    assert eval_transform(224, 0.875).box(256, 256) == (16, 16, 240, 240)


def test_half_of_the_random_crops_are_flipped():
    image = corner_image()
    unflipped = eval_transform((16, 24))(image)
    full_crop = RandomCrop((16, 24), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    random.seed(0)
    flipped = sum(torch.equal(full_crop(image), unflipped.flip(2)) for _ in range(200))
    assert 70 < flipped < 130
    without_flip = RandomCrop((16, 24), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert all(torch.equal(without_flip(image), unflipped) for _ in range(20))


def test_reduced_decoding_shows_the_same_image():
    encoded = encode(smooth_image(1203, 901), "JPEG", quality=95)
    full = LazyImage(LazyImage(encoded).decode())
    for box, size in (((0, 0, 1203, 901), (32, 24)), ((101, 77, 900, 801), (48, 40)), ((3, 5, 70, 60), (64, 64))):
        found = np.asarray(LazyImage(encoded).crop(box, size)).astype(int)
        assert np.abs(found - np.asarray(full.crop(box, size)).astype(int)).mean() < 0.5


def test_crops_are_resized_as_asked():
    image, whole = noise_image(40, 32), {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": False}
    for name, resample in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        found = RandomCrop((16, 20), **whole, interpolation=name)(image)
        expected = torch.from_numpy(np.array(image.resize((20, 16), resample))).permute(2, 0, 1) / 255
        assert torch.equal(found, expected)
