"""ViTDet's feature pyramid."""

import pytest
import torch
from tiny_detectors import VITDET

from addp_core.base.errors import UserError
from addp_core.networks.encoder import Encoder, EncoderConfig
from det.config import DetectorConfig
from det.pyramid import FeaturePyramid


def test_the_pyramid_has_vitdets_levels_and_detectron2s_names():
    encoder = Encoder(EncoderConfig(32, 2, 2), (64, 64), 16, VITDET, dynamic=True)
    pyramid = FeaturePyramid(encoder, channels=8)
    maps = pyramid(torch.randn(2, 3, 64, 32))
    assert pyramid.strides == [4, 8, 16, 32, 64]
    assert [tuple(m.shape) for m in maps.values()] == [(2, 8, 64 // s, 32 // s or 1) for s in (4, 8, 16, 32, 64)]
    assert torch.equal(maps["4"], maps["3"][:, :, ::2, ::2])
    names = {name for name in pyramid.state_dict() if not name.startswith("net.")}
    norm = ("weight", "bias")
    expected = {f"simfp_{n}.{i}.{p}" for n, i in ((2, 0), (2, 1), (2, 3), (3, 0)) for p in norm}
    for n, first in ((2, 4), (3, 1), (4, 0), (5, 1)):
        expected |= {f"simfp_{n}.{i}.{p}" for i in (first, first + 1) for p in ("weight", "norm.weight", "norm.bias")}
    assert names == expected
    centered = maps["0"] - maps["0"].mean(1, keepdim=True)
    # the norm is over channels, at each position
    assert torch.allclose(centered.pow(2).mean(1), torch.ones(2, 16, 8), atol=1e-2)


def test_impossible_scales_are_refused():
    with pytest.raises(UserError, match=r"detector.scales: found \[4.0, 2.0\] with 2-pixel patches"):
        FeaturePyramid(Encoder(EncoderConfig(32, 1, 2), (8, 8), 2), 8, (4.0, 2.0))
    for scales in ((1.0, 2.0), (4.0, 1.0), (3.0,), ()):
        with pytest.raises(ValueError, match="scales: found"):
            DetectorConfig(scales=scales)
