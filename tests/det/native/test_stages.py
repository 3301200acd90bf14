"""CNNs in detectron2's own way: FPN over their stages in configs of its zoo and in LazyConfigs, export and back."""

# ruff: noqa: E402 (modules that need detectron2 are imported after the check that it is installed)

from pathlib import Path

import pytest
import torch
from checks import assert_user_error, same_weights
from safetensors.torch import load_file
from tiny import random_tensor, tiny_cnn_addp

from addp_core import load_encoder, save_model
from addp_core.recipes.cli import main

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("toy_sets")]  # deprecated names of torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.modeling import FPN, build_backbone, build_model
from tiny_detectors import CATEGORIES
from zoo import (
    MASK,
    RETINANET,
    check_that_the_run_is_read,
    exported_and_back,
    model_from_export,
    trained_in,
    zoo_config,
)

import det
from det.config import DetectorArchitecture, DetectorConfig, describe_encoder
from det.model import build_detector


@pytest.fixture(scope="module")
def cnn_file(tmp_path_factory) -> Path:
    """The file of an ADDP whose encoder is a small ResNet."""
    path = tmp_path_factory.mktemp("cnn") / "addp.safetensors"
    save_model(tiny_cnn_addp(image_size=(32, 32)), path)
    return path


def config(name: str, source: Path | str, out: Path | str = "", backbone: str = "EncoderFPN", **encoder) -> CfgNode:
    cfg = zoo_config(name, source, out, **encoder)
    cfg.MODEL.BACKBONE.NAME = backbone
    return cfg


@pytest.mark.parametrize("name", [MASK, RETINANET])
def test_a_config_of_the_zoo_is_trained_evaluated_and_read_without_the_pretrained_file(
    name, cnn_file, toy_coco, tmp_path, capsys
):
    source, out = tmp_path / "pretrained.safetensors", tmp_path / "out"
    source.write_bytes(cnn_file.read_bytes())
    trainer = trained_in(out, config(name, source, out))
    before = load_encoder(cnn_file, 64).state_dict()
    after = trainer.model.backbone.bottom_up.encoder.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert any("layer3" in key for key in changed)
    assert not any("running" in key or "layer1." in key or key.startswith("body.conv1") for key in changed)  # FREEZE_AT
    check_that_the_run_is_read(out, trainer, [source], toy_coco, capsys)
    assert load_encoder(out / "model_final.pth", 32).config.arch == "test_resnet"


def test_the_maps_are_those_of_the_file_and_of_detectron2s_fpn(cnn_file):
    images = random_tensor(1, 3, 96, 64)
    stages = build_backbone(config(MASK, cnn_file, backbone="EncoderStages"))
    for mode in (False, True):  # with frozen statistics
        maps = stages.train(mode)(images)
        for found, expected in zip(maps.values(), load_encoder(cnn_file).forward_maps(images, range(4)), strict=True):
            torch.testing.assert_close(found, expected)
    assert {name: (shape.stride, shape.channels) for name, shape in stages.output_shape().items()} == {
        name: (4 * 2**i, maps[name].shape[1]) for i, name in enumerate(("res2", "res3", "res4", "res5"))
    }
    for name, levels in ((MASK, ["p2", "p3", "p4", "p5", "p6"]), (RETINANET, ["p3", "p4", "p5", "p6", "p7"])):
        assert list(build_backbone(config(name, cnn_file))(images)) == levels


def test_a_lazy_config_with_detectron2s_fpn(cnn_file, tmp_path):
    lazy = LazyCall(FPN)(
        bottom_up=LazyCall(det.EncoderStages)(
            encoder=LazyCall(load_encoder)(source=str(cnn_file), img_size=64, drop_path=0.1, stages=True), freeze_at=1
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=8,
    )
    fpn = instantiate(lazy)
    assert [tuple(map_.shape) for map_ in fpn(random_tensor(1, 3, 64, 64)).values()] == [
        (1, 8, 16 // 2**i, 16 // 2**i) for i in range(4)
    ]
    assert same_weights(fpn.bottom_up.encoder, load_encoder(cnn_file, 64))


def test_a_detector_is_exported_to_detectron2_and_back(cnn_file, tmp_path):
    encoder = load_encoder(cnn_file, 32)
    heads = DetectorConfig(channels=16, convs=8, fc=16, proposals=20, samples=8)
    parts = {"size": 32, "detector": heads, "categories": CATEGORIES}
    architecture = DetectorArchitecture("detectron2", **describe_encoder(encoder), **parts)
    torch.manual_seed(0)
    model = build_detector(architecture, encoder).eval()
    theirs, again = exported_and_back(model, tmp_path)
    images = random_tensor(1, 3, 32, 32)
    found, expected = (m.backbone(images) for m in (theirs, model.rcnn))
    assert all(torch.equal(found[name], map_) for name, map_ in expected.items())
    assert again.architecture.cnn_encoder == architecture.cnn_encoder


def test_a_pretrained_cnn_is_exported_as_the_weights_of_a_config_of_the_zoo(cnn_file, tmp_path):
    out = tmp_path / "d2"
    assert main(["export", f"model={cnn_file}", f"out={out}", "layout=detectron2", "img_size=64"]) == 0
    model = model_from_export(out)
    assert same_weights(model.backbone.bottom_up.encoder, load_encoder(cnn_file, 64))


MISTAKES = {
    "MODEL.ENCODER.attention: found {": {"attention": {"window": 4}},
    "MODEL.ENCODER.levels: found ['p2'], but a CNN is read at its four stages": {"levels": ["p2"]},
    "a CNN; expected MODEL.BACKBONE.NAME=EncoderFPN or EncoderStages for a CNN, or a ViT": {
        "backbone": "EncoderPyramid"
    },
    "MODEL.ENCODER.cnn: found 'resnet5', expected a CNN of timm": {"source": "", "cnn": "resnet5"},
    "has its own; leave one of the two out": {"cnn": "resnet50"},
    "MODEL.ENCODER.source: missing": {"source": ""},
    "MODEL.ENCODER.patch_size: found 8, but a CNN is read": {"patch_size": 8},
}


def test_mistakes_are_told_in_one_line(cnn_file, encoder_file, tmp_path):
    for message, options in MISTAKES.items():
        cfg = config(MASK, **{"source": cnn_file, **options})
        error = assert_user_error(lambda cfg=cfg: build_backbone(cfg))
        assert message in error
    vit = config(MASK, encoder_file)
    assert_user_error(lambda: build_backbone(vit), "a ViT; expected a CNN, or MODEL.BACKBONE.NAME=EncoderPyramid")
    model = build_model(config(MASK, cnn_file))
    torch.save({"model": load_file(cnn_file)}, tmp_path / "encoder.pth")
    with pytest.raises(Exception, match="the checkpoint has an encoder under other names"):
        DetectionCheckpointer(model).load(str(tmp_path / "encoder.pth"))
