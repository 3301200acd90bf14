"""Encoders, detectors and training samples that are small enough for tests."""

from typing import Literal

import torch

from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder, EncoderConfig
from det.augment import DetectionSample
from det.config import Category, DetectorArchitecture, DetectorConfig, Interpolation
from det.model import Detector, build_detector

VITDET = AttentionConfig(window=3, global_blocks=1, relative="decomposed", class_token=False)
VITDET_4_BLOCKS = AttentionConfig(window=2, global_blocks=2, relative="decomposed", class_token=False)
CATEGORIES = (Category(2, "two"), Category(7, "seven"))
NARROW = DetectorConfig(channels=16, scales=(1.0, 0.5), convs=16, fc=32, proposals=50, samples=16)


def tiny_encoder(attention: AttentionConfig | None = None, size: int = 32, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    config = EncoderConfig(32, 2, 2)
    return Encoder(config, (size, size), 4, attention or AttentionConfig(), dynamic=True).eval()


def tiny_detector(
    score: float = 0.0,
    samples: int = 8,
    normalisation: Literal["imagenet", "half"] = "imagenet",
    masks: bool = True,
    interpolation: Interpolation = "bicubic",
) -> Detector:
    """Return a detector of the engine torchvision for images of 32 pixels."""
    encoder = tiny_encoder(VITDET)
    options = {"channels": 16, "scales": (2.0, 1.0), "convs": 8, "fc": 16, "proposals": 20, "score": score}
    config = DetectorConfig(masks=masks, samples=samples, **options)
    architecture = DetectorArchitecture(
        "torchvision", encoder.config, VITDET, 4, 32, config, CATEGORIES, normalisation, interpolation
    )
    return build_detector(architecture, encoder)


def tiny_detectron2_architecture(encoder: Encoder) -> DetectorArchitecture:
    """Return the architecture of a detectron2 detector around an encoder with 8-pixel patches, for 32-pixel images."""
    return DetectorArchitecture("detectron2", encoder.config, encoder.attention, 8, 32, NARROW, CATEGORIES)


def sample_with_boxes(*boxes: tuple[int, int, int, int], seed: int = 0) -> DetectionSample:
    """Return a noise image of 32 pixels whose objects are filled boxes."""
    masks = torch.zeros(len(boxes), 32, 32, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(len(boxes)) % 2
    return DetectionSample(image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels, masks)
