"""Pixels as tensors: JPEGs are decoded as Pillow decodes them, and crops resized as Pillow resizes them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_data import QUICK, encode, make_stream, memory_source, noise_image, smooth_image, take_batches
from PIL import Image

from addp_core.data import pixels
from addp_core.data.images import ImageError, LazyImage, RandomCrop
from addp_core.data.pixels import decode_jpeg, resize_part, stack_pixels, to_float

JPEGS = {
    "4:2:0": encode(noise_image(50, 37), "JPEG"),
    "4:4:4": encode(noise_image(50, 37), "JPEG", subsampling=0),
    "progressive": encode(smooth_image(33, 21), "JPEG", progressive=True),
    "grayscale": encode(noise_image(41, 30).convert("L"), "JPEG"),
    "one pixel": encode(noise_image(1, 1), "JPEG"),
}


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise_image(30, 20), "JPEG", exif=exif)


ODD_IMAGES = {
    "turned": turned_jpeg(),
    "CMYK": encode(noise_image(30, 20).convert("CMYK"), "JPEG"),
    "16 bits": encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
    "transparent": encode(Image.new("RGBA", (9, 9), (200, 100, 0, 51))),
    "PNG": encode(noise_image(30, 20)),
}


def read(encoded: bytes, method) -> bytes | str:
    """Return the pixels that a method of LazyImage reads, or its error."""
    try:
        found = method(LazyImage(encoded))
    except ImageError as error:
        return str(error)
    return (as_array(found) if isinstance(found, torch.Tensor) else np.asarray(found)).tobytes()


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("encoded", JPEGS.values(), ids=JPEGS)
def test_jpegs_have_the_pixels_of_pillow(encoded, monkeypatch):
    expected = np.asarray(LazyImage(encoded).decode())
    found = decode_jpeg(encoded)
    assert (as_array(found) == expected).all()
    monkeypatch.setattr(pixels, "torchvision_decode_jpeg", None)  # as in a torchvision without decoders
    assert decode_jpeg(encoded) is None
    assert torch.equal(LazyImage(encoded).pixels(), found)


@pytest.mark.parametrize("encoded", ODD_IMAGES.values(), ids=ODD_IMAGES)
def test_odd_images_are_left_to_pillow(encoded):
    expected = np.asarray(LazyImage(encoded).decode())
    assert (as_array(LazyImage(encoded).pixels()) == expected).all()
    size = expected.shape[1::-1]
    whole = LazyImage(encoded).crop_pixels((0, 0, *size), size, resize="torch")
    assert (as_array(whole) == expected).all()


@QUICK
@given(st.sampled_from(sorted(JPEGS)), st.data())
def test_damaged_jpegs_have_the_pixels_of_pillow_or_its_error(name, data):
    encoded = bytearray(JPEGS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    encoded = encoded[: data.draw(st.integers(1, len(encoded)))]
    assert read(bytes(encoded), LazyImage.pixels) == read(bytes(encoded), LazyImage.decode)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("box", "size"), [((3, 5, 90, 61), (32, 24)), ((0, 0, 20, 30), (64, 64)), ((7, 7, 8, 8), (8, 9))]
)
def test_a_part_is_resized_as_pillow_resizes_a_crop(box, size, interpolation):
    image = noise_image(120, 80)
    expected = image.crop(box).resize(size, getattr(Image.Resampling, interpolation.upper()))
    found = resize_part(torch.from_numpy(np.array(image)).permute(2, 0, 1), box, size, interpolation)
    difference = np.abs(as_array(found).astype(int) - np.asarray(expected))
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_reduced_jpegs_and_fractions_of_pixels_are_left_to_pillow():
    large, small = encode(smooth_image(1203, 901), "JPEG"), encode(noise_image(90, 70), "JPEG")
    for encoded, box in ((large, (100, 60, 900, 860)), (small, (3.5, 2, 60, 50))):
        found = LazyImage(encoded).crop_pixels(box, (32, 24), resize="torch")
        assert (as_array(found) == np.asarray(LazyImage(encoded).crop(box, (32, 24)))).all()


def test_batches_are_bytes_until_the_device():
    images = [resize_part(decode_jpeg(JPEGS["4:2:0"]), (0, 0, 50 - i, 37), (12, 8)) for i in range(4)]
    stacked = stack_pixels(images)
    assert (stacked.shape, stacked.dtype) == ((4, 3, 8, 12), torch.uint8)
    assert stacked.is_contiguous(memory_format=torch.channels_last)  # as decoded: nothing was transposed
    mirrored = torch.tensor([True, False, False, True])
    found = to_float(stacked, mirrored)
    assert found.is_contiguous()
    expected = torch.stack([image.flip(-1) if flip else image for image, flip in zip(images, mirrored, strict=True)])
    assert torch.equal(found, expected.float() / 255)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_sends_bytes_and_its_images_are_those_of_the_crop(workers):
    (batch,) = take_batches(make_stream(memory_source(6), 5, resize="pillow", workers=workers), 1)
    assert batch.pixels.dtype == torch.uint8
    assert 0 < batch.mirrored.sum() < 5
    assert torch.equal(batch.images, to_float(batch.pixels, batch.mirrored))
    assert (batch.images.dtype, batch.images.is_contiguous()) == (torch.float32, True)


def test_resizes_differ_by_less_than_a_grey_level():
    source = memory_source(6)
    runs = [take_batches(make_stream(source, 6, resize=resize, scale=(1.0, 1.0)), 2) for resize in ("torch", "pillow")]
    for ours, pillows in zip(*runs, strict=True):
        assert torch.equal(ours.indices, pillows.indices)
        assert torch.equal(ours.mirrored, pillows.mirrored)
        assert 0 < 255 * (ours.images - pillows.images).abs().mean() < 20  # noise, whose crops have other borders
    image = noise_image(40, 32)  # a crop of the whole image has none
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": False}
    ours, pillows = (RandomCrop((16, 20), **whole, resize=resize)(image) for resize in ("torch", "pillow"))
    assert 255 * (ours - pillows).abs().mean() < 0.1
