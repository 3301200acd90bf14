"""The corruptions of ImageNet-C: determinism, severities, and lengths that scale with the image."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from addp_core.data.corruptions import CORRUPTIONS, SEVERITIES, apply_corruption


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """float[112,112,3] in [0,1]"""
    image = Image.fromarray(load_sample_image("china.jpg"))
    return np.asarray(image.resize((112, 112), Image.Resampling.BICUBIC, box=(100, 0, 527, 427))) / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_deterministic_and_grow_with_severity(name, photograph):
    clean, differences = photograph, []
    for severity in SEVERITIES:
        corrupted, repeated = (apply_corruption(clean, name, severity, np.random.default_rng(0)) for _ in range(2))
        assert corrupted.shape == clean.shape
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        assert (corrupted == repeated).all()
        differences.append(np.abs(corrupted - clean).mean())
    assert differences[0] > 0.01
    if name == "elastic_transform":  # as published: large warps at severity 1 and 2, ripples at 3 to 5
        assert differences[0] < differences[1]
        assert differences[2] < differences[3] < differences[4]
    else:
        assert differences[0] < differences[2] < differences[4]


def test_lengths_scale_with_the_image(photograph):
    """Corrupting an image of half the size gives the corrupted image at half the size."""
    clean = np.repeat(np.repeat(photograph, 2, 0), 2, 1)
    for name in ("defocus_blur", "motion_blur", "zoom_blur"):
        large = apply_corruption(clean, name, 4, np.random.default_rng(0))
        small = apply_corruption(clean.reshape(112, 2, 112, 2, 3).mean((1, 3)), name, 4, np.random.default_rng(0))
        assert np.abs(large.reshape(112, 2, 112, 2, 3).mean((1, 3)) - small).mean() < 0.01, name


@pytest.mark.parametrize(
    ("severity", "zooms", "largest"), [(1, 12, 1.11), (2, 16, 1.15), (3, 11, 1.2), (4, 13, 1.24), (5, 11, 1.3)]
)
def test_zooms_are_the_published_ones(severity, zooms, largest, photograph):
    """np.arange(1, 1.11, 0.01) has twelve values, because of rounding, and those of the other severities none more."""
    pixels = Image.fromarray((photograph * 255 + 0.5).astype(np.uint8))
    total = photograph.copy()
    for factor in np.linspace(1, largest, zooms):
        border = (112 - 112 / factor) / 2
        box = (border, border, 112 - border, 112 - border)
        total += np.asarray(pixels.resize((112, 112), Image.Resampling.BILINEAR, box=box)) / 255
    found = apply_corruption(photograph, "zoom_blur", severity, np.random.default_rng(0))
    assert np.abs(found - total / (1 + zooms)).max() < 1e-3
