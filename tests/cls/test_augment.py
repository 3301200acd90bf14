"""timm's augmentation after a random crop that is resized by torch."""

import random

import numpy as np
import pytest
import torch
from image_data import (
    MemorySource,
    concatenate,
    encode,
    equal_rows,
    make_stream,
    noise_image,
    smooth_image,
    take_batches,
)
from timm.data import create_transform

from addp_core.data.images import LazyImage
from cls.augment import CroppedFirst

SETTINGS = {"scale": (0.3, 1.0), "hflip": 0.5, "color_jitter": None, "interpolation": "bicubic"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_it_draws_what_timm_draws(kind):
    transform = create_transform((24, 32), is_training=True, **SETTINGS, re_prob=1.0, re_mode="pixel")
    image = LazyImage(encode(smooth_image(90, 70), kind, **({"quality": 95} if kind == "JPEG" else {})))
    ours = CroppedFirst(transform)
    for seed in range(6):
        ours.seed(seed)
        found, number = ours.sample(image), random.random()
        ours.seed(seed)
        expected = transform(image.decode())
        assert random.random() == number
        assert (found.shape, found.dtype) == ((3, 24, 32), torch.float32)
        assert (found - expected).abs().max() < 0.05  # erased parts and mirroring too; a grey level is 0.02


def test_rand_augment_is_a_function_of_the_seed():
    transform = create_transform(16, is_training=True, **SETTINGS, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
    source = MemorySource([encode(noise_image(40, 30, seed=i), "JPEG") for i in range(6)])
    one, two = (take_batches(make_stream(source, transform=CroppedFirst(transform), workers=n), 2) for n in (0, 2))
    assert equal_rows(concatenate(one), concatenate(two))
    assert np.isfinite(concatenate(one)[0].numpy()).all()
