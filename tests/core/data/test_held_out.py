"""Which images are held out: of each class those with the lowest digests, whatever the number of classes."""

import hashlib

import numpy as np
import pytest
from image_data import MemorySource

from addp_core.base.errors import UserError
from addp_core.data.held_out import hold_out, keep_share
from addp_core.data.image_source import ImageSource


def labeled(labels: list[int], classes: int) -> MemorySource:
    """Return images with these labels, whose content is their index."""
    source = MemorySource([str(i).encode() for i in range(len(labels))], tuple(f"class {i}" for i in range(classes)))
    source.labels = np.array(labels)
    return source


def contents(source: ImageSource) -> list[int]:
    return [int(source.read_bytes(i)[0]) for i in range(len(source))]


def by_digest(source: ImageSource, label: int, seed: int) -> list[int]:
    """Return the images of a class in the order of the digests of the seed and their names."""
    names = source.relative_names()
    images = [i for i in range(len(source)) if source.labels[i] == label]
    return sorted(images, key=lambda i: hashlib.blake2b(names[i], key=str(seed).encode(), digest_size=8).digest())


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_images_of_each_class_with_the_lowest_digests(share):
    labels = np.random.default_rng(0).integers(-1, 7, 300)  # -1: without a class, never held out
    source = labeled(np.where(labels == 3, 4, labels).tolist(), 8)  # classes 3 and 7 have no images
    train, held = hold_out(source, share, seed=5, every_class=False)
    expected = []
    for label in range(8):
        images = by_digest(source, label, 5)
        expected += images[: max(1, round(share * len(images)))] if images else []
    assert contents(held) == sorted(expected)
    assert contents(train) == sorted(set(range(300)) - set(expected))
    assert held.labels.tolist() == source.labels[sorted(expected)].tolist()


def test_a_share_to_train_on():
    source = labeled([0, 1] * 40, 2)
    kept = keep_share(source, 0.25, seed=1, key="share")
    assert contents(kept) == sorted(by_digest(source, 0, 1)[:10] + by_digest(source, 1, 1)[:10])


def test_a_class_of_one_image_cannot_be_divided():
    with pytest.raises(UserError, match="class 'class 1' has 1 image; expected at least two"):
        hold_out(labeled([0, 0, 1], 2), 0.5, seed=0)
