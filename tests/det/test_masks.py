"""Polygons that reach far outside of their image."""

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, annotation, coco_content, rectangle
from pycocotools import mask as coco_mask

from det.augment import CropWindow
from det.masks import to_rle


def rasterize(polygon: list[float], height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return coco_mask.decode(to_rle([polygon], height, width))


@pytest.mark.parametrize("far", [2e8, 1e12, 1e300])
def test_a_corner_far_outside_takes_neither_memory_nor_time(far):
    """COCO's own rasterizer walks along the edges pixel by pixel: at 2e8 it takes all memory."""
    mask = rasterize([5, 5, far, 5, far, far, 5, far])  # everything right of and below (5, 5)
    assert mask[5:, 5:].all()
    assert mask.sum() == (HEIGHT - 5) * (WIDTH - 5)
    assert not rasterize([far, far, far, 2 * far, 2 * far, 2 * far]).any()


def test_clipping_equals_rasterizing_on_a_large_canvas():
    generator = np.random.default_rng(0)
    for _ in range(50):
        polygon = generator.uniform(-300, 300, 8).tolist()
        canvas = rasterize((np.array(polygon) + 400).tolist(), 800, 800)[400 : 400 + HEIGHT, 400 : 400 + WIDTH]
        assert (rasterize(polygon) != canvas).mean() < 0.02  # a pixel here and there on the edges


def test_ordinary_polygons_are_not_changed():
    polygon = [-20.0, -3.3, 2.0 * WIDTH, 7.7, 9.1, 2.0 * HEIGHT]
    direct = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH)))
    assert np.array_equal(rasterize(polygon), direct)


def test_a_far_corner_is_clipped_on_reading_and_after_the_jitter(make_dataset, caplog):
    far = [[5.0, 4.0, 2e8, 3.5e8, 5.0, 18.0]]
    dataset = make_dataset(coco_content(annotation(1, 0, 7, (5, 4, 8, 8), segmentation=far)))
    assert "with corners far outside the image, where the polygon was clipped (1)" in caplog.text
    (polygon,) = dataset.objects(0)[0]["segmentation"]
    assert max(map(abs, polygon)) < 200
    window = CropWindow((WIDTH, HEIGHT), (0, 0, 1e-4, 1e-4), WIDTH, HEIGHT, False)  # an extreme enlargement
    assert window.crop_mask(rectangle(0, 0, WIDTH, HEIGHT)).all()


def test_objects_of_impossibly_large_images_are_skipped(make_dataset):
    content = coco_content(annotation(1, 0, 7, (5, 5, 8, 8)), annotation(2, 10, 7, (5, 5, 8, 8)))
    content["images"][0].update(height=10**9, width=10**9)
    reason = "of images of more than 178956970 pixels"
    assert make_dataset(content).skipped == {reason: [1]}
