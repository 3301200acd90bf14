"""Small images, sources and streams for the tests of `addp_core.data`."""

import io
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import Tensor

from addp_core.data.config import DataConfig
from addp_core.data.images import pretrain_transform
from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch, Stream

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth_image(width: int, height: int) -> Image.Image:
    """Return an image of smooth colors, which compresses well."""
    return noise_image(8, 6, seed=3).resize((width, height), Image.Resampling.BICUBIC)


def save_image(path: Path, image: Image.Image | None = None) -> None:
    """Write an image (default: noise) and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise_image(10, 10)).save(path)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(root: Path, count: int = 3) -> None:
    """Write shards that contain the same file names, so that only the shard's name tells images apart."""
    for shard in range(count):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            for i in range(4):
                add_member(tar, f"{i}.png", encode(noise_image(12, 12, seed=10 * shard + i)))


def write_folders_named_after_splits(root: Path, size: tuple[int, int]) -> None:
    """Write in/{train,test,other}/a.jpg and, of one of these folders, test.tar."""
    for folder in ("train", "test", "other"):
        save_image(root / "in" / folder / "a.jpg", Image.new("RGB", size))
    with tarfile.open(root / "test.tar", "w") as tar:
        tar.add(root / "in" / "test", "test")


class MemorySource(ImageSource):
    """Encoded images from a list; None stands for an image that cannot be read."""

    def __init__(self, items: list[bytes | None], classes: tuple[str, ...] = ()):
        self.items, self.classes = items, classes

    def __len__(self) -> int:
        return len(self.items)

    def read_bytes(self, index: int) -> tuple[bytes, int]:
        """Return the image and, with classes, its index as label."""
        item = self.items[index]
        if item is None:
            raise OSError("no such image")
        return item, index if self.classes else -1

    def name(self, index: int) -> str:
        """Return "image-<index>"."""
        return f"image-{index}"


def memory_source(count: int, broken: tuple[int, ...] = ()) -> MemorySource:
    """Return `count` small noise images of different sizes whose labels are their indices."""
    items = [None if i in broken else encode(noise_image(12 + i % 5, 10 + i % 3, seed=i)) for i in range(count)]
    return MemorySource(items, tuple(map(str, range(count))))


def make_stream(source: ImageSource, batch: int = 4, seed: int = 0, transform: Any = None, **options: Any) -> Stream:
    """Return a stream of images of 8 x 8 pixels without workers; options: keys of `DataConfig`."""
    config = DataConfig(**{"size": 8, "workers": 0, **options})
    return Stream(source, transform or pretrain_transform(config), config, seed=seed, batch=batch)


def take_batches(stream: Stream, count: int, start: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    """Return `count` batches from micro-step `start` on."""
    batches = stream.batches(start, rank, world)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def concatenate(batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images, labels and indices of all batches."""
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.indices for batch in batches]),
    )


def equal_rows(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Return whether two results of `concatenate` are equal."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
