"""The encoder as a detectron2 backbone, and detectron2's feature pyramid over it."""

# ruff: noqa: E402 (modules that need detectron2 are imported after the check that it is installed)

import pytest
import torch
from tiny_detectors import VITDET_4_BLOCKS

from addp_core.networks.attention import AttentionConfig
from addp_core.weights.encoders import load_encoder
from det.pyramid import FeaturePyramid

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = pytest.mark.filterwarnings("ignore")  # detectron2 uses deprecated names of torch

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import SimpleFeaturePyramid, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from det.native.backbone import EncoderBackbone


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Move all weights away from their initialization, so that each of them affects the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


def test_plain_backbone_returns_the_patch_tokens_of_the_recognition_encoder(encoder_file):
    images = torch.randn(2, 3, 48, 64)
    backbone = EncoderBackbone(encoder=load_encoder(encoder_file, 32, attention=AttentionConfig(), dynamic=True))
    expected = load_encoder(encoder_file, (48, 64)).forward_features(images)[:, 1:]
    tokens = backbone(images)["last_feat"]
    assert tokens.shape == (2, 32, 6, 8)
    torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_backbone_is_registered(encoder_file):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "EncoderBackbone"
    attention = {"window": 2, "global_blocks": 2, "relative": "decomposed", "class_token": False}
    cfg.MODEL.ENCODER = CfgNode({"source": str(encoder_file), "img_size": 32, "dynamic": True, "attention": attention})
    backbone = build_backbone(cfg)
    assert backbone.size_divisibility == backbone.output_shape()["last_feat"].stride == 8
    assert backbone.encoder.attention == VITDET_4_BLOCKS
    assert backbone(torch.randn(1, 3, 40, 24))["last_feat"].shape == (1, 32, 5, 3)


def test_detectron2s_pyramid_equals_our_own(encoder_file):
    encoder = perturbed(load_encoder(encoder_file, 64, attention=VITDET_4_BLOCKS, dynamic=True))
    theirs = perturbed(
        SimpleFeaturePyramid(
            EncoderBackbone(encoder=encoder), "last_feat", 24, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN"
        )
    ).eval()
    theirs.top_block.in_feature = "p4"
    ours = FeaturePyramid(load_encoder(encoder_file, 64, attention=VITDET_4_BLOCKS, dynamic=True), 24).eval()
    ours.load_state_dict({name.replace("net.encoder.", "net."): v for name, v in theirs.state_dict().items()})
    images = torch.randn(1, 3, 48, 80)  # neither square nor a multiple of the window
    with torch.no_grad():
        pairs = list(zip(ours(images).values(), theirs(images).values(), strict=True))
    assert [tuple(map_.shape[-2:]) for map_, _ in pairs] == [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    for found, expected in pairs:
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_checkpointing_changes_no_gradient_of_the_backbone(encoder_file):
    gradients = []
    for checkpointing in (False, True):
        encoder = load_encoder(encoder_file, 32, attention=VITDET_4_BLOCKS, dynamic=True)
        backbone = EncoderBackbone(encoder=encoder, checkpointing=checkpointing).train()
        backbone(torch.ones(1, 3, 32, 32))["last_feat"].square().sum().backward()
        gradients.append(encoder.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)
