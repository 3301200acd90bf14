"""Large-scale jitter, the boxes recomputed from the cropped masks, and batches."""

import json
import random

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco_content, run_lengths
from PIL import Image
from pycocotools import mask as coco_mask

from det.augment import DetectionSample, LargeScaleJitter, collate
from det.coco import AnnotatedImage, CocoDataset
from det.masks import bounding_box, to_rle


def jittered(image: AnnotatedImage, seed: int, **options) -> DetectionSample:
    random.seed(seed)
    return LargeScaleJitter(32, **options).sample(image)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_recomputed_from_the_cropped_masks(make_dataset, seed):
    size = [HEIGHT, WIDTH]
    triangle = [[4.0, 3.0, 24.0, 3.0, 4.0, 17.0]]
    counts = run_lengths(coco_mask.decode(to_rle(triangle, *size)))
    entries = [
        annotation(1, 0, 7, (4, 3, 20, 14), segmentation=triangle),
        annotation(2, 0, 2, (4, 3, 20, 14), segmentation={"size": size, "counts": counts}),
        annotation(3, 0, 2, (4, 3, 20, 14), iscrowd=1),
    ]
    dataset = make_dataset(coco_content(*entries))
    sample = jittered(dataset.open_image(0)[0], seed, scale=(0.3, 3.0))
    assert max(sample.image.shape[1:]) <= 32
    assert sample.masks.shape[1:] == sample.image.shape[1:]
    assert sample.image.dtype == torch.uint8
    assert len(sample.labels) in (0, 1, 2)  # a crop may miss an object; the crowd never counts
    for box, mask in zip(sample.boxes, sample.masks, strict=True):
        assert tuple(box.tolist()) == bounding_box(mask.numpy())
        assert (box[2:] > box[:2]).all()
    if len(sample.labels) == 2:  # polygons moved and filled, run lengths filled and resized: equal up to a pixel
        a, b = sample.masks.bool()
        assert (a & b).sum() > 0.8 * (a | b).sum() or (a | b).sum() < 40
        assert sample.labels.tolist() == [1, 0]
    repeated = jittered(dataset.open_image(0)[0], seed, scale=(0.3, 3.0))
    assert torch.equal(sample.image, repeated.image)
    assert torch.equal(sample.masks, repeated.masks)


def test_the_image_and_its_masks_move_together(tmp_path):
    """The object is white, the rest black: in every crop, the mask covers the white pixels."""
    box, pixels = (6, 4, 12, 9), np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[4:13, 6:18] = 255
    Image.fromarray(pixels).save(tmp_path / "0.png")
    content = {**coco_content(annotation(1, 0, 7, box)), "images": coco_content()["images"][:1]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset, compared = CocoDataset(tmp_path / "a.json", tmp_path), 0
    for seed in range(10):
        sample = jittered(dataset.open_image(0)[0], seed, scale=(0.8, 2.0))
        if len(sample.labels):
            white = sample.image.float().mean(0) > 127
            mask = sample.masks[0].bool()
            assert (white & mask).sum() >= 0.8 * (white | mask).sum()
            compared += 1
    assert compared > 5


def test_small_images_keep_their_size_and_are_flipped_half_of_the_time(make_dataset):
    dataset = make_dataset(coco_content(annotation(1, 0, 7, (0, 0, 10, 20))))
    lefts = []
    for seed in range(20):
        sample = jittered(dataset.open_image(0)[0], seed, scale=(0.5, 0.5))  # 16 x 11
        assert sample.image.shape == (3, 11, 16)
        lefts.append(int(sample.boxes[0, 0]))
    assert set(lefts) == {0, 11} or set(lefts) == {0, 10}
    unflipped = [jittered(dataset.open_image(0)[0], seed, scale=(0.5, 0.5), flip=False) for seed in range(8)]
    assert {int(sample.boxes[0, 0]) for sample in unflipped} == {0}


def test_a_batch_gives_each_image_its_objects(make_dataset):
    dataset = make_dataset(coco_content(annotation(1, 0, 7, (2, 2, 20, 15)), annotation(2, 0, 2, (5, 5, 12, 12))))
    samples = [jittered(dataset.open_image(i)[0], 1, scale=(1.0, 1.0)) for i in (1, 0, 1)]
    batch = collate(samples, torch.full((3,), -1), torch.tensor([1, 0, 1]), [])
    assert len(batch) == 3
    assert batch.counts == [0, 2, 0]
    split = batch.samples()
    assert [len(sample.labels) for sample in split] == [0, 2, 0]
    assert torch.equal(split[1].masks, samples[1].masks)


@pytest.mark.parametrize("seed", range(8))
def test_without_masks_boxes_are_cropped_as_their_masks_would_be(make_dataset, seed):
    content = coco_content(annotation(1, 0, 7, (4, 3, 12, 9)), annotation(2, 0, 2, (20, 10, 8, 8)))
    image = make_dataset(content).open_image(0)[0]
    with_masks = jittered(image, seed, scale=(0.5, 3.0))
    boxes_alone = jittered(make_dataset(content).open_image(0)[0], seed, scale=(0.5, 3.0), masks=False)
    assert boxes_alone.masks is None
    assert torch.equal(with_masks.image, boxes_alone.image)
    for box, label in zip(with_masks.boxes, with_masks.labels, strict=True):
        alike = boxes_alone.boxes[boxes_alone.labels == label]
        assert len(alike) or ((box[2:] - box[:2]) <= 2).any()  # a sliver may be below one pixel without its mask
        assert not len(alike) or (alike[0] - box).abs().max() <= 1
    batch = collate([boxes_alone], torch.tensor([-1]), torch.tensor([0]), [])
    assert batch.masks is None
    assert batch.samples()[0].masks is None


def test_a_batch_keeps_true_sizes(make_dataset):
    dataset = make_dataset(coco_content(annotation(1, 0, 7, (2, 2, 20, 15))))
    samples = [jittered(dataset.open_image(0)[0], 1, scale=(s, s)) for s in (0.5, 1.0)]
    batch = collate(samples, torch.full((2,), -1), torch.tensor([0, 0]), [])
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.sizes == [(11, 16), (21, 32)]
    for restored, sample in zip(batch.samples(), samples, strict=True):
        assert torch.equal(restored.image, sample.image)
        assert torch.equal(restored.masks, sample.masks)


def test_the_interpolation_changes_pixels_and_not_boxes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    content = coco_content(annotation(1, 0, 7, (2, 2, 20, 15)), images=1)
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = CocoDataset(tmp_path / "a.json", tmp_path)
    samples = {
        name: jittered(dataset.open_image(0)[0], 3, scale=(0.8, 0.8), flip=False, interpolation=name)
        for name in ("bicubic", "bilinear")
    }
    h, w = samples["bilinear"].image.shape[1:]
    expected = np.array(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR))
    assert torch.equal(samples["bilinear"].image, torch.from_numpy(expected).permute(2, 0, 1))
    assert not torch.equal(samples["bilinear"].image, samples["bicubic"].image)
    assert torch.equal(samples["bilinear"].boxes, samples["bicubic"].boxes)
