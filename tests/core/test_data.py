"""Sources, decoding, crops and the stream, on tiny images made here."""

import io
import logging
import multiprocessing
import os
import random
import signal
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.images import CenterCrop, ImageError, LazyImage, RandomCrop, eval_transform, pretrain_transform
from addp_core.data.sources import ImageSource, open_source
from addp_core.data.stream import Stream
from addp_core.recipes import config as recipes

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    small = noise(8, 6, seed=3)
    return small.resize((width, height), Image.Resampling.BICUBIC)


def corners(width: int = 24, height: int = 16) -> Image.Image:
    """A picture that none of the eight orientations maps to itself."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    image.paste((0, 255, 0), (width - 8, 0, width, 8))
    image.paste((0, 0, 255), (0, height - 8, 8, height))
    return image


class Memory(ImageSource):
    """Encoded images from a list; None stands for one that cannot be read."""

    def __init__(self, items: list[bytes | None], classes: tuple[str, ...] = ()):
        self.items, self.classes = items, classes

    def __len__(self) -> int:
        return len(self.items)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        if self.items[index] is None:
            raise OSError("no such image")
        return self.items[index], index if self.classes else -1

    def name(self, index: int) -> str:
        return f"image-{index}"


def memory(count: int, broken: tuple[int, ...] = ()) -> Memory:
    items = [None if i in broken else encode(noise(12 + i % 5, 10 + i % 3, seed=i)) for i in range(count)]
    return Memory(items, tuple(map(str, range(count))))


def stream_of(source: ImageSource, batch: int = 4, seed: int = 0, transform=None, **options) -> Stream:
    config = DataConfig(**{"size": 8, "workers": 0, **options})
    return Stream(source, transform or pretrain_transform(config), config, seed=seed, batch=batch)


def first(stream: Stream, count: int, start: int = 0, rank: int = 0, world: int = 1) -> list:
    batches = stream.batches(start, rank, world)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def rows(batches: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat([getattr(batch, key) for batch in batches]) for key in ("images", "labels", "indices"))


def same(left: tuple, right: tuple) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -------------------------------------------------------------------------------------------------------- decoding


def rgb(encoded: bytes) -> np.ndarray:
    image = LazyImage(encoded).decode()
    assert image.mode == "RGB"
    return np.asarray(image)


def test_16_bit_greyscale_is_scaled_not_clipped():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for kind in ("PNG", "TIFF"):
        found = rgb(encode(Image.fromarray(values), kind))
        assert (found == (values // 257)[..., None]).all()
    between = np.array([[0, 128, 129, 300, 65535, 65407]], dtype=np.uint16)
    assert rgb(encode(Image.fromarray(between)))[0, :, 0].tolist() == [0, 0, 1, 1, 255, 255]


def test_16_bit_greyscale_through_a_crop():
    values = np.full((20, 20), 30000, dtype=np.uint16)
    image = eval_transform(8)(LazyImage(encode(Image.fromarray(values))))
    assert torch.allclose(image, torch.full((3, 8, 8), 30000 / 65535), atol=0.5 / 255)


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(rgb(encode(image, "JPEG", quality=95)).astype(int) - (255, 0, 0)).max() < 12
    crop = eval_transform(8)(LazyImage(encode(image, "JPEG", quality=95)))
    assert torch.allclose(crop.mean((1, 2)), torch.tensor([1.0, 0, 0]), atol=0.05)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert rgb(encode(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert rgb(encode(image, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert rgb(encode(image, transparency=bytes([255, 0]))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert rgb(encode(image, "GIF", transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
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
def test_modes_and_alpha_on_white(mode, colour, expected):
    encoded = encode(Image.new(mode, (9, 9), colour))
    assert np.abs(rgb(encoded).astype(int) - expected).max() <= 1
    crop = eval_transform(8)(LazyImage(encoded)) * 255
    assert torch.allclose(crop.mean((1, 2)), torch.tensor(expected, dtype=torch.float32), atol=1)


def test_transparent_colour_of_grey_and_rgb():
    assert rgb(encode(Image.new("L", (4, 4), 9), transparency=9)).min() == 255
    assert rgb(encode(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(corners(), kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))
    picture = LazyImage(encoded)
    assert (picture.height, picture.width) == expected.shape[:2]
    assert (np.asarray(picture.decode()) == expected).all()
    top, right = 2, expected.shape[1] - 3  # a box away from the middle shows whether it was turned too
    crop = np.asarray(LazyImage(encoded).crop((right - 5, top, right, top + 4), (5, 4)))
    assert (crop == expected[top : top + 4, right - 5 : right]).all()


def test_orientation_with_a_reduced_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    big = corners(24, 16).resize((960, 640), Image.Resampling.NEAREST)
    picture = LazyImage(encode(big, "JPEG", exif=exif, quality=95))
    assert (picture.width, picture.height) == (640, 960)
    small = np.asarray(picture.crop((0, 0, 640, 960), (16, 24))).astype(int)
    expected = np.asarray(corners(24, 16).transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(small - expected)[2:6, 2:6].max() < 20  # inside a corner: blue comes to the top left
    assert np.abs(small - expected).mean() < 12


def test_broken_exif_beside_sound_pixels():
    encoded = encode(smooth(20, 20), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert LazyImage(encoded).decode().size == (20, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_errors(kind, share):
    encoded = encode(noise(64, 48), kind)
    cut = encoded[: int(len(encoded) * share)]
    with pytest.raises(ImageError):
        LazyImage(cut).decode()
    with pytest.raises(ImageError):
        eval_transform(8)(LazyImage(cut))


def test_truncated_progressive_jpeg_and_reduced_decoding():
    encoded = encode(noise(600, 500), "JPEG", progressive=True)
    with pytest.raises(ImageError, match="truncated"):
        eval_transform(16)(LazyImage(encoded[: len(encoded) * 2 // 3]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"just text, no picture", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would start Ghostscript
        (b"\xff\xd8\xff\xe0", "not an image"),
    ],
)
def test_what_is_no_image_says_why(content, reason):
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


def test_greyscale_without_a_range_is_an_error():
    with pytest.raises(ImageError, match="32-bit"):
        LazyImage(encode(Image.new("F", (9, 9), 0.5), "TIFF")).decode()


@QUICK
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), st.data())
def test_damaged_files_give_an_image_or_an_image_error(kind, data):
    encoded = bytearray(encode(smooth(24, 20), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    for read in (lambda: LazyImage(bytes(encoded)).decode(), lambda: eval_transform(8)(LazyImage(bytes(encoded)))):
        reason = None
        try:
            read()
        except ImageError as error:
            reason = str(error)
        assert reason != ""


# ------------------------------------------------------------------------------------------------------------ crops


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
def test_any_size_of_image_and_target(hw, size):
    for transform in (RandomCrop(hw), CenterCrop(hw)):
        image = transform(noise(*size))
        assert image.shape == (3, *hw)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert 0 <= image.min() <= image.max() <= 1


def test_eval_transform_is_resize_then_centre_crop():
    image = smooth(80, 60)
    expected = image.resize((32, 24), Image.Resampling.BICUBIC).crop((4, 0, 28, 24))
    found = eval_transform(24)(image)
    assert (found - torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255).abs().max() <= 2 / 255
    assert CenterCrop((24, 48)).box(80, 60) == (0, 10, 80, 50)
    assert eval_transform(224, 0.875).box(256, 256) == (16, 16, 240, 240)


def test_mirror_is_a_coin():
    image = corners()
    plain = eval_transform((16, 24))(image)
    whole = RandomCrop((16, 24), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    random.seed(0)
    flipped = sum(torch.equal(whole(image), plain.flip(2)) for _ in range(200))
    assert 70 < flipped < 130
    never = RandomCrop((16, 24), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert all(torch.equal(never(image), plain) for _ in range(20))


def test_reduced_decoding_shows_the_same_picture():
    encoded = encode(smooth(1203, 901), "JPEG", quality=95)
    whole = LazyImage(LazyImage(encoded).decode())
    for box, size in (((0, 0, 1203, 901), (32, 24)), ((101, 77, 900, 801), (48, 40)), ((3, 5, 70, 60), (64, 64))):
        found = np.asarray(LazyImage(encoded).crop(box, size)).astype(int)
        assert np.abs(found - np.asarray(whole.crop(box, size)).astype(int)).mean() < 0.5


# ---------------------------------------------------------------------------------------------------------- sources


def save(path: Path, image: Image.Image | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(10, 10)).save(path)


def names_of(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def test_flat_folder_in_order_without_the_other_files(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.webp", "ü ñ.jpeg"):
        save(tmp_path / name)
    for name in ("notes.txt", ".hidden.jpg", "._a.jpg", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert names_of(source, tmp_path) == ["a.PNG", "b.jpg", "c.webp", "ü ñ.jpeg"]
    image, label = source.read(0)
    assert (image.mode, image.size, label, source.classes) == ("RGB", (10, 10), None, ())


def test_nested_folders_where_some_images_lie_on_top_have_no_classes(tmp_path):
    for name in ("top.jpg", "2019/may/a.jpg", "2019/b.jpg", "2020/c.jpg"):
        save(tmp_path / name)
    source = open_source(DataConfig(source=str(tmp_path)))
    assert names_of(source, tmp_path) == ["2019/b.jpg", "2019/may/a.jpg", "2020/c.jpg", "top.jpg"]
    assert source.classes == ()
    assert source.read(1)[1] is None


def test_imagenet_folders(tmp_path):
    for name in ("train/n02/x.JPEG", "train/n01/y.JPEG", "train/n01/z.JPEG", "val/n02/v.JPEG"):
        save(tmp_path / name)
    (tmp_path / "val" / "n01").mkdir()  # a class without images keeps its label
    train, val = open_source(str(tmp_path)), open_source(str(tmp_path), "val")
    assert train.classes == val.classes == ("n01", "n02")
    assert [train.read(i)[1] for i in range(3)] == [0, 0, 1]
    assert val.read(0)[1] == 1
    assert len(open_source(DataConfig(source=str(tmp_path), split="validation"))) == 1
    with pytest.raises(UserError, match=r"data\.split.*no folder 'test'; it has train, val"):
        open_source(str(tmp_path), "test")


def test_classes_given_by_the_caller_or_a_file(tmp_path):
    for name in ("set/cat/a.png", "set/dog/b.png"):
        save(tmp_path / name)
    root = str(tmp_path / "set")
    source = open_source(root, classes=["ant", "dog", "cat"])
    assert [source.read(i)[1] for i in range(2)] == [2, 1]
    (tmp_path / "classes.txt").write_text("dog\nant\ncat\n\n")
    source = open_source(DataConfig(source=root, classes=str(tmp_path / "classes.txt")))
    assert source.classes == ("dog", "ant", "cat")
    assert [source.read(i)[1] for i in range(2)] == [2, 0]
    with pytest.raises(UserError, match=r"data\.classes: .*(dog is none of the 2 classes; did you mean 'dogs')"):
        open_source(root, classes=["cat", "dogs"])
    with pytest.raises(UserError, match=r"data\.classes: .* cannot be read"):
        open_source(DataConfig(source=root, classes=str(tmp_path / "no.txt")))


def test_published_lists(tmp_path):
    for name in ("train/n02/a b.png", "train/n01/c.png", "train/unlisted.png", "val/v1.png", "val/v2.png"):
        save(tmp_path / name)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "train.txt").write_text("n02/a b.png 1\n\nn01/c.png 0\n")
    (tmp_path / "meta" / "val.txt").write_text("v1.png 1\nv2.png 0\n")
    train, val = open_source(str(tmp_path)), open_source(str(tmp_path), "val")
    assert names_of(train, tmp_path) == ["train/n02/a b.png", "train/n01/c.png"]
    assert [train.read(i)[1] for i in range(2)] == [1, 0]
    assert train.classes == ("n01", "n02")
    assert [val.read(i)[1] for i in range(2)] == [1, 0]
    assert val.classes == ("0", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\n", "line 1 is 'a.png'; expected \"relative/path label\""),
        ("a.png 0\na.png cat\n", "line 2"),
        ("a.png -1\n", "line 1"),
        ("\n", "lists no image"),
        ("gone.png 0\n", "gone.png does not exist"),
        ("\0\xff", "line 1"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    save(tmp_path / "train" / "a.png")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "train.txt").write_text(text)
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_tar_file_and_tars_within_it(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add(tar, "k.png", encode(Image.new("RGB", (4, 4), (7, 0, 0))))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        add(tar, "dog/10.png", encode(Image.new("RGB", (4, 4), (10, 0, 0))))
        add(tar, "dog/9.png", encode(Image.new("RGB", (4, 4), (9, 0, 0))))
        add(tar, "cat/1.png", encode(Image.new("RGB", (4, 4), (1, 0, 0))))
        add(tar, "readme.txt", b"no image")
        add(tar, "koala.tar", inner.getvalue())
    source = open_source(str(tmp_path / "all.tar"))
    found = [source.read(i) for i in range(len(source))]
    assert [image.getpixel((0, 0))[0] for image, _ in found] == [1, 9, 10, 7]
    assert [source.classes[label] for _, label in found] == ["cat", "dog", "dog", "koala"]
    assert source.name(0) == f"{tmp_path}/all.tar/cat/1.png"


def shards(root: Path, count: int = 3) -> None:
    """Shards with the same names inside: only the shard's name tells them apart."""
    for shard in range(count):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            for i in range(4):
                add(tar, f"{i}.png", encode(noise(12, 12, seed=10 * shard + i)))


def test_tar_shards_in_an_order_of_their_own(tmp_path, monkeypatch):
    shards(tmp_path)
    source = open_source(str(tmp_path))
    expected = [f"{tmp_path}/shard-{shard}.tar/{i}.png" for shard in range(3) for i in range(4)]
    assert [source.name(i) for i in range(len(source))] == expected
    for i in range(12):
        assert (np.asarray(source.read(i)[0]) == np.asarray(noise(12, 12, seed=10 * (i // 4) + i % 4))).all()
    monkeypatch.setattr(
        "timm.data.readers.reader_image_in_tar.glob", lambda *_, **__: sorted(map(str, tmp_path.iterdir()))[::-1]
    )
    again = open_source(str(tmp_path))
    assert [again.name(i) for i in range(12)] == expected
    assert (np.asarray(again.read(5)[0]) == np.asarray(source.read(5)[0])).all()
    assert not list(tmp_path.glob("*.pickle"))


def test_tar_shards_in_forked_workers(tmp_path):
    shards(tmp_path)
    source = open_source(str(tmp_path))
    expected = rows(first(stream_of(source), 12))  # the parent's files are open when the workers start
    assert same(rows(first(stream_of(source, workers=2), 12)), expected)


def test_a_tar_cut_between_members_is_warned_of(tmp_path, caplog):
    shards(tmp_path, 2)
    open_source(str(tmp_path))
    assert "truncated" not in caplog.text
    path = tmp_path / "shard-1.tar"
    path.write_bytes(path.read_bytes()[:1024])
    assert len(open_source(str(tmp_path))) == 5
    assert f"{path} has no end-of-archive marker" in caplog.text


def test_hub_set_through_timm(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split in ("train", "validation"):
        for name in ("cat/a.png", "dog/b.png"):
            save(tmp_path / "set" / split / name)
    source = open_source(f"hfds/{tmp_path / 'set'}")
    assert (len(source), source.classes, source.read(1)[1]) == (2, ("cat", "dog"), 1)
    validation = open_source(f"hfds/{tmp_path / 'set'}", "val")
    assert (validation.labels.tolist(), validation.read(1)[1]) == ([0, 1], 1)
    with pytest.raises(UserError, match="split 'test'"):
        open_source(f"hfds/{tmp_path / 'set'}", "test")
    with pytest.raises(UserError, match=r"data\.image_key.*'img'; expected one of image, label"):
        open_source(DataConfig(source=f"hfds/{tmp_path / 'set'}", image_key="img"))


class Hub:
    """A stand-in for timm's reader of a set with these splits, of two images, and for the set itself."""

    class_to_idx = {"cat": 0, "dog": 1}  # noqa: RUF012

    def __init__(self, splits):
        self.splits, self.split, self.dataset = splits, "", self

    def __call__(self, _, split, **__):
        if split not in self.splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {self.splits}.')
        self.split = split
        return self

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": "", "label": np.array([1.0, np.nan]) if isinstance(index, slice) else 1}

    def select_columns(self, _):
        return self

    def with_format(self, _):
        return self


@pytest.mark.parametrize(
    ("asked", "splits", "taken"),
    [
        ("val", ["train", "validation", "test"], "validation"),
        ("val", ["train", "test"], "test"),
        ("val", ["val", "validation"], "val"),
        ("validation", ["train", "val", "test"], "val"),
        ("train", ["train"], "train"),
        ("train[:10%]", ["train[:10%]"], "train[:10%]"),
        ("validation", ["train", "test"], None),
        ("val", ["train"], None),
    ],
)
def test_hub_splits(asked, splits, taken, monkeypatch):
    hub = Hub(splits)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("addp_core.data.sources.create_reader", hub)
    if taken is None:
        with pytest.raises(UserError, match=rf"split '{asked}'.*cannot be opened: Unknown split \"{asked}\".*'train'"):
            open_source("hfds/someone/something", asked)
    else:
        source = open_source("hfds/someone/something", asked)
        assert hub.split == taken
        assert source.labels.tolist() == [1, -1]  # the second has none


def test_hub_set_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_source("hfds/someone/something")


@pytest.mark.parametrize("kind", ["wds", "hfids", "tfds"])
def test_streams_are_refused_with_the_way_out(kind):
    with pytest.raises(UserError, match=r"random access.*\.tar files, or hfds/"):
        open_source(f"{kind}/imagenet")


def text_files(root: Path) -> None:
    for i in range(3):
        (root / f"{i}.txt").write_text("text")
    (root / "table.csv").write_text("1,2")


def broken_tar(root: Path) -> None:
    (root / "x.tar").write_bytes(b"no tar at all" * 100)


def imageless_tar(root: Path) -> None:
    with tarfile.open(root / "x.tar", "w") as tar:
        add(tar, "a.txt", b"text")


def cut_tar(root: Path) -> None:
    shards(root, 1)
    path = root / "shard-0.tar"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "holds no files; expected images"),
        (lambda root: (root / "sub").mkdir(), "holds no files"),
        (text_files, "holds no image but 4 other files (3 .txt, 1 .csv); expected .jpg"),
        (broken_tar, "cannot be read as .tar"),
        (imageless_tar, "holds no image; expected .jpg"),
        (cut_tar, "cannot be read as .tar"),
    ],
)
def test_nothing_to_read(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path))
    assert str(error.value).startswith(f"data.source: {tmp_path} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"does not exist.*did you mean 'photos'"):
        open_source(str(tmp_path / "photo"))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="is a file"):
        open_source(str(tmp_path / "photos.zip"))
    with pytest.raises(UserError, match=r"data\.source: missing"):
        open_source(DataConfig())


def test_links_in_circles_end(tmp_path):
    save(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert names_of(open_source(str(tmp_path)), tmp_path) == ["link.png", "real/a.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match=r"no permission.*locked"):
        open_source(str(tmp_path))


def test_config_checks():
    load = lambda *settings: recipes.load(DataConfig, None, list(settings))  # noqa: E731
    assert load("size=[64,32]").hw == (64, 32)
    assert load("workers=null").workers is None
    for setting in ("size=4", "size=[64,4]", "scale=[0,1]", "scale=[0.5,0.2]", "scale=[0.5,1.1]", "ratio=[0,1]"):
        with pytest.raises(UserError, match=setting.partition("=")[0]):
            load(setting)
    assert recipes.load(DataConfig, None, recipes_text := ["max_errors=0.5", "cache=ram"]).cache == "ram", recipes_text


# ----------------------------------------------------------------------------------------------------------- stream


@QUICK
@given(st.integers(1, 9), st.integers(1, 7), st.data())
def test_ranks_share_the_batch_of_one_process(count, batch, data):
    world = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, 30))
    stream = stream_of(memory(count), batch)
    whole = first(stream, 2, start)
    parts = [first(stream, 2, start, rank, world) for rank in range(world)]
    for step in range(2):
        assert same(rows([part[step] for part in parts]), rows([whole[step]]))
    slices = [stream.rows_of(rank, world) for rank in range(world)]
    assert [row for each in slices for row in range(each.start, each.stop)] == list(range(batch))


@QUICK
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 12), st.integers(0, 3))
def test_starting_later_is_skipping(count, batch, start, seed):
    stream = stream_of(memory(count), batch, seed)
    assert same(rows(first(stream, 2, start)), rows(first(stream, start + 2)[start:]))


@QUICK
@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 5))
def test_every_image_once_an_epoch(count, batch, seed):
    stream = stream_of(memory(count), batch, seed)
    _, labels, indices = rows(first(stream, -(-3 * count // batch)))
    for epoch in range(3):
        assert sorted(indices[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    assert torch.equal(labels, indices)


def test_orders_differ_between_epochs_and_seeds():
    order = lambda seed: rows(first(stream_of(memory(32), 32, seed), 2))[2]  # noqa: E731
    assert not torch.equal(order(0)[:32], order(0)[32:])
    assert not torch.equal(order(0), order(1))


def restless(image: Image.Image) -> torch.Tensor:
    """A transform that draws from all three sources of random numbers."""
    return torch.full((3, 2, 2), random.random() + np.random.rand()) + torch.rand(3, 2, 2)


@pytest.mark.parametrize("transform", [None, restless])
def test_any_number_of_workers_gives_the_same_bits(transform):
    source = memory(10, broken=(3,))
    runs = [first(stream_of(source, transform=transform, workers=workers, max_errors=2), 6, 2) for workers in (0, 1, 3)]
    assert all(same(rows(run), rows(runs[0])) for run in runs[1:])
    assert all([batch.errors for batch in run] == [batch.errors for batch in runs[0]] for run in runs[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_random_numbers_are_left_alone(workers):
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = [draw() for _ in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    batches = stream_of(memory(6), transform=restless, workers=workers).batches(0, 0, 1)
    found = []
    for _ in range(3):
        found.append(draw())
        next(batches)
    batches.close()
    assert found == expected


def test_batch_shapes_and_ranges():
    (batch,) = first(stream_of(memory(6), 5, size=(16, 8)), 1)
    assert (batch.images.shape, batch.images.dtype) == ((5, 3, 16, 8), torch.float32)
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert (batch.labels.dtype, batch.indices.dtype, len(batch), batch.errors) == (torch.int64, torch.int64, 5, [])
    assert first(stream_of(Memory([encode(noise(9, 9))])), 1)[0].labels.tolist() == [-1] * 4


def test_unreadable_images_are_replaced_counted_and_named_once(caplog):
    caplog.set_level(logging.WARNING, "addp")
    stream = stream_of(memory(8, broken=(2, 5)), 8, max_errors=2)
    batches = first(stream, 3)
    assert stream.errors == {"image-2": "no such image", "image-5": "no such image"}
    for batch in batches:
        assert set(batch.indices.tolist()) == {0, 1, 3, 4, 6, 7}
        assert {name for name, _ in batch.errors} == {"image-2", "image-5"}
    assert [record.getMessage().count("unreadable image") for record in caplog.records] == [1, 1]
    assert "image-" in caplog.text
    sound = first(stream_of(memory(8), 8), 3)  # the others are as they would have been
    for batch, other in zip(batches, sound, strict=True):
        kept = batch.indices == other.indices
        assert kept.sum() == 6
        assert torch.equal(batch.images[kept], other.images[kept])


@pytest.mark.parametrize(("limit", "tolerated"), [(0, 0), (0.5, 5), (0.001, 1), (1, 1), (3, 3), (0.25, 2)])
def test_max_errors_is_a_share_or_a_count(limit, tolerated):
    assert stream_of(memory(10), max_errors=limit).error_limit == tolerated


@pytest.mark.parametrize("workers", [0, 2])
def test_past_the_limit_the_run_ends_with_names(workers):
    stream = stream_of(memory(20, broken=tuple(range(7))), 20, max_errors=6, workers=workers)
    with pytest.raises(UserError) as error:
        first(stream, 2)
    message = str(error.value)
    assert message.startswith("data.max_errors: 7 of 20 images unreadable, 6 tolerated: image-")
    assert "(no such image)" in message
    assert "and 2 more" in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_any_readable_image(workers):
    stream = stream_of(memory(5, broken=tuple(range(5))), max_errors=1000, workers=workers)
    with pytest.raises(UserError, match="5 of 5 images unreadable"):
        first(stream, 1)


def test_truncated_jpegs_in_a_folder(tmp_path):
    for i in range(6):
        noise(40, 40, seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:900])
    stream = stream_of(open_source(str(tmp_path)), 6, max_errors=1)
    first(stream, 1)
    assert list(stream.errors) == [str(tmp_path / "3.jpg")]
    assert "truncated" in stream.errors[str(tmp_path / "3.jpg")]
    with pytest.raises(UserError, match=r"data\.max_errors.*3\.jpg \(.*truncated"):
        first(stream_of(open_source(str(tmp_path)), 6, max_errors=0), 1)


def test_files_that_vanish_count_as_unreadable(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    source = open_source(str(tmp_path))
    (tmp_path / "1.png").unlink()
    stream = stream_of(source, 4, max_errors=1)
    first(stream, 1)
    assert list(stream.errors.values()) == ["No such file or directory"]


def faulty(image: Image.Image) -> torch.Tensor:
    raise RuntimeError("a mistake in the transform")


@pytest.mark.parametrize("workers", [0, 1])
def test_mistakes_in_a_transform_are_not_taken_for_bad_images(workers):
    with pytest.raises(RuntimeError, match="a mistake in the transform"):
        first(stream_of(memory(4), transform=faulty, workers=workers), 1)


class Dying:
    """A transform whose process is killed as long as fewer than `times` marks lie in the folder."""

    def __init__(self, marks: Path, times: int):
        self.marks, self.times = marks, times

    def __call__(self, image: Image.Image) -> torch.Tensor:
        dead = len(list(self.marks.iterdir()))
        if dead < self.times:
            (self.marks / str(dead)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 2, 2)


def test_a_dead_worker_is_replaced(tmp_path, caplog):
    batches = first(stream_of(memory(8), transform=Dying(tmp_path, 1), workers=1), 3)
    assert same(rows(batches), rows(first(stream_of(memory(8), transform=Dying(tmp_path, 1)), 3)))
    assert "restarting the data workers at micro-step 0" in caplog.text


def test_workers_that_keep_dying_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"died three times at micro-step 0.*data\.workers=0"):
        first(stream_of(memory(8), transform=Dying(tmp_path, 99), workers=1), 1)


def test_signals_to_the_whole_group_leave_the_workers_working():
    batches = stream_of(memory(8), workers=2).batches(0, 0, 1)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    for _ in range(8):
        next(batches)
    batches.close()
    assert not any(child.is_alive() for child in children)


def test_images_kept_in_memory(tmp_path):
    for i in range(6):
        smooth(200, 150).save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "small.png").write_bytes(encode(noise(12, 9)))
    source = open_source(str(tmp_path))
    plain = first(stream_of(source, 7, max_errors=2), 3)
    kept = stream_of(source, 7, max_errors=2, cache="ram")
    assert min(kept.source.read(0)[0].size) == 21  # 8 pixels from the smallest crop: 8 / sqrt(0.2 * 0.75)
    assert kept.source.read(6)[0].size == (12, 9)
    for path in tmp_path.iterdir():
        path.unlink()
    for workers in (0, 2):
        kept.config.workers = workers
        found = first(kept, 3)
        assert torch.equal(rows(found)[2], rows(plain)[2])
        assert (rows(found)[0] - rows(plain)[0]).abs().mean() < 0.01  # the same crops
        assert list(kept.errors) == [str(tmp_path / "2.jpg")]


def test_a_full_cache_reads_the_rest_each_time(caplog):
    source = Memory([encode(noise(40, 40, seed=i), "PNG") for i in range(300)])
    stream = stream_of(source, 8, cache="ram", cache_gb=1e-6)
    assert "hold 256 of 300 images" in caplog.text
    assert len({int(i) for batch in first(stream, 38) for i in batch.indices}) == 300


def test_more_processes_than_rows():
    with pytest.raises(UserError, match="batch: found 3 images per step for 4 processes"):
        stream_of(memory(4), 3).rows_of(0, 4)
    with pytest.raises(UserError, match="batch: found 0"):
        stream_of(memory(4), 0)
